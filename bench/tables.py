"""The experiments behind the tables of docs/: runs them, goes on where it was stopped, prints the tables.

    python bench/tables.py tden --list                     what is done, what is left, and the minutes each took
    python bench/tables.py tden --jobs 2                   all that is left, two runs at a time, a thread each
    python bench/tables.py tden --only vqa                 the runs whose name matches, and those that they start from
    python bench/tables.py tden --report                   the tables of what is finished, in Markdown
    python bench/tables.py tden --steps-scale 0.02 --out /tmp/dry      does everything run?

Each run is a folder below --out, with what it printed beside it (NAME.txt). One with metrics.json is finished and
skipped; one with a checkpoint goes on by --resume; one without either is removed and started anew. Ctrl-C lets the
programs save what they have: the same command goes on. A run of other settings than the plan's is an error. All numbers
of the tables come from the metrics.json of the runs, those of a first look from their log.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before this folder, which has a tden.py of its own

import common
from common import UserError

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------------------------------------------------------------
# The plan, by paper. A paper's first table is its pre-training; rows of later tables may start from rows of it.


@dataclass(frozen=True)
class Row:
    name: str  # in the table, and with hyphens for blanks in the name of the folder
    flags: str = ""  # what makes it this row, beside task, steps and seed
    start: str = ""  # row of the first table whose weights it starts from, of the same seed
    steps: int = 1  # times the steps of its table


@dataclass(frozen=True)
class Table:
    task: str
    steps: int
    metrics: str  # the columns: names in metrics.json, split `test`; the shuffled control stands beside each
    rows: tuple[Row, ...]


SEEDS = (0, 1)
TDEN_STARTS = (
    Row("from scratch"),
    Row("after two passes", start="two passes"),
    Row("after one pass", start="one pass"),
    Row("after shared", start="shared"),
)
SOHO_STARTS = (
    Row("from scratch"),
    Row("after dictionary and MVM", start="dictionary and MVM"),
    Row("after no dictionary", start="no dictionary"),
)
OFTEN = "--start-steps 400 --eval-every 40 --val-items 250"  # many points for the curves of the first look
PLANS = {
    "tden": (
        Table("pretrain", 600, "true@1 R@1 caption_true CIDEr_D", (
            Row("two passes"),
            Row("one pass", "--passes 1", steps=2),  # as many updates, twice as many pictures
            Row("shared", "--no-decoupled"),  # as many parameters
        )),
        Table("pretrain", 300, "true@1 R@1 caption_true CIDEr_D", (
            Row("as it is"),
            Row("understanding memory", "--decoder-memory understanding"),
            Row("sampled words", "--ss-mode sample"),
            Row("one update", "--no-two-updates"),  # as many iterations, half as many updates
            Row("hardest negative", "--hardest"),
        )),
        Table("retrieval", 300, "true@1 R@1 R@5", TDEN_STARTS),
        Table("vqa", 300, "vqa_accuracy vqa_accuracy_yes/no vqa_accuracy_color", TDEN_STARTS),
        Table("vcr", 100, "vcr_qa vcr_qar vcr_q2ar", TDEN_STARTS[:2]),
        Table("caption", 300, "caption_true CIDEr_D BLEU_4", TDEN_STARTS),
    ),
    "soho": (
        Table("pretrain", 700, "itm_accuracy itm_accuracy_edited true@1 codes_used", (
            Row("dictionary and MVM", "--mvm-prob 0.15"),
            Row("dictionary", "--mvm-prob 0"),
            Row("no dictionary", "--vd-mode none"),
            Row("coin 0.015", "--mvm-prob 0.015"),
            Row("coin 1", "--mvm-prob 1"),
            Row("frozen ResNet", "--freeze-cnn 1"),  # but for what it learned in word_steps
            Row("code alone", "--vd-mode replace"),
            Row("update of the paper", "--vd-update paper"),
            Row("full world", "--world full"),
        )),
        Table("vqa", 300, "vqa_accuracy vqa_accuracy_yes/no vqa_accuracy_color", SOHO_STARTS),
        Table("nlvr2", 300, "nlvr2_accuracy nlvr2_consistency", SOHO_STARTS),
        Table("ve", 300, "ve_accuracy", (Row("from scratch", "--world full"),
                                         Row("after full world", "--world full", start="full world"))),
    ),
    "vilta": (
        Table("pretrain", 640, "itm_accuracy itm_accuracy_edited mlm_accuracy mlm_synonyms true@1", (
            Row("baseline", f"--arm baseline {OFTEN}"),
            Row("cd", f"--arm cd {OFTEN}"),
            Row("hn", f"--arm hn {OFTEN}"),
            Row("cd+hn", f"--arm cd+hn {OFTEN}"),
        )),
    ),
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Runs


@dataclass(frozen=True)
class Planned:
    """One run of the plan. `start`: the name of the run that has to be finished before."""

    name: str
    folder: Path
    words: tuple[str, ...]  # flags of the program, but for --out
    start: str

    def state(self) -> str:
        """done | stopped (there is a checkpoint) | broken (there is none) | left. UserError: another run's folder."""
        if not self.folder.exists():
            return "left"
        if (self.folder / "config.json").is_file():
            found = common.read_json(self.folder / "config.json")
            odd = [f"{name} {found.get(name)} instead of {value}" for name, value in settings_of(self.words).items()
                   if name != "init" and type(found.get(name))(value) != found.get(name)]  # fmt: skip
            if odd:
                raise UserError(f"{self.folder} holds a run of other settings ({', '.join(odd)}): give another --out")
        elif any(self.folder.iterdir()):
            raise UserError(f"{self.folder} holds something that is no run: give another --out")
        if (self.folder / "metrics.json").is_file():
            return "done"
        return "stopped" if any(self.folder.glob("step_*/model.safetensors")) else "broken"

    def metrics(self) -> dict | None:
        return common.read_json(self.folder / "metrics.json") if self.state() == "done" else None


def settings_of(words) -> dict:
    """Flags -> {field of the program's Config: its value as written}; of a switch "1" or ""."""
    found, ends = {}, (*words[1:], "--")
    for word, after in zip(words, ends, strict=True):
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            is_switch = after.startswith("--")
            value = ("" if name.startswith("no_") else "1") if is_switch else after
            found[name.removeprefix("no_") if is_switch else name] = value
    return found


def name_of(table: Table, row: Row, seed) -> str:
    return f"{table.task}-{row.name.replace(' ', '-')}-{seed}"


def words_of(tables, table: Table, row: Row, seed, out: Path, scale: float) -> list[str]:
    steps = max(1, round(table.steps * row.steps * scale))
    words = ["--task", table.task, "--steps", str(steps), "--seed", str(seed), *row.flags.split()]
    by_name = {first.name: first for first in tables[0].rows}
    return words + (["--init", str(out / name_of(tables[0], by_name[row.start], seed))] if row.start else [])


def planned(paper: str, out: Path, scale: float) -> dict[str, Planned]:
    """{name: run} in the order of the plan, those of one table and seed beside one another."""
    tables, runs = PLANS[paper], {}
    known = {field.name for field in dataclasses.fields(importlib.import_module(paper).Config)}
    for table in tables:
        for seed in SEEDS:
            for row in table.rows:
                name, words = name_of(table, row, seed), words_of(tables, table, row, seed, out, scale)
                if odd := settings_of(words).keys() - known:
                    raise UserError(f"the plan's run {name} has flags that {paper}.py does not know: {odd}")
                start = Path(words[-1]).name if row.start else ""
                runs[name] = Planned(name, out / name, tuple(words), start)
    return runs


def start(paper: str, words: list[str], log: Path, jobs: int):
    """The program in a process of its own; all that it says goes to the end of `log`."""
    threads = {"OMP_NUM_THREADS": "1"} if jobs > 1 else {}
    with log.open("a") as file:
        file.write(f"\n$ python {paper}.py {shlex.join(words)}\n")
        file.flush()
        command = [sys.executable, str(ROOT / f"{paper}.py"), *words]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **threads})


def run_all(paper: str, left: list[Planned], jobs: int) -> list[str]:
    """Run what is left, `jobs` at a time, none before the run that it starts from; the names of those that failed."""
    running, failed, waits_for = {}, [], {run.name for run in left}
    try:
        while left or running:
            while len(running) < jobs and (run := next((run for run in left if run.start not in waits_for), None)):
                left.remove(run)
                state = run.state()
                if state == "broken":
                    shutil.rmtree(run.folder)
                words = ["--resume", str(run.folder)] if state == "stopped" else [*run.words, "--out", str(run.folder)]
                print(f"{time.strftime('%H:%M')}  {run.name}" + "  (goes on)" * (state == "stopped"), flush=True)
                running[run] = start(paper, words, run.folder.with_suffix(".txt"), jobs)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                running.pop(run)
                if run.state() == "done":
                    waits_for.discard(run.name)
                else:
                    failed.append(run.name)
                    print(f"       {run.name} failed: see {run.folder.with_suffix('.txt')}", flush=True)
            if not running and all(run.start in waits_for for run in left):
                return failed + [f"{run.name} (waits)" for run in left]
            time.sleep(0.2)
    except KeyboardInterrupt:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        raise common.Stopped("stopped, what ran is saved; the same command goes on") from None
    return failed


# ---------------------------------------------------------------------------------------------------------------------
# What is told


def minutes(run: Planned) -> float:
    """Of a finished run; where it was resumed, of its last leg alone, as metrics.json has it."""
    return run.metrics()["seconds"] / 60


def listing(runs: list[Planned]) -> str:
    lines = []
    for run in runs:
        state = run.state()
        resumed = " (last leg)" if state == "done" and run.metrics()["protocol"]["resumed"] else ""
        lines.append(f"{state:<8}{f'{minutes(run):.1f} min{resumed}' if state == 'done' else '':>20}  {run.name}")
    done = [run for run in runs if run.state() == "done"]
    return "\n".join(lines) + f"\n{len(done)} of {len(runs)} done, {sum(map(minutes, done)):.0f} minutes in all"


def report(paper: str, runs: dict[str, Planned], out: Path, scale: float) -> str:
    """A table for each of the plan's that has a finished run: seeds side by side, below it the commands."""
    lines, tables = [], PLANS[paper]
    for table in tables:
        of_row = {row: [runs[name_of(table, row, seed)].metrics() for seed in SEEDS] for row in table.rows}
        found = [metrics for row in of_row.values() for metrics in row if metrics]
        if not found:
            continue

        def cell(row, *path, of_row=of_row, form="{:.3f}"):
            values = []
            for value in of_row[row]:
                for key in path:
                    value = value.get(key) if value else None
                values.append("-" if value is None else form.format(value))
            return " / ".join(values)

        names = table.metrics.split()
        head = ["", *(title for name in names for title in (name, "shuffled")), "parameters"]
        lines += [f"### {paper}, {table.task}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in table.rows:
            cells = [cell(row, "splits", "test", *path, name) for name in names
                     for path in (("metrics",), ("controls", "shuffled_images"))]  # fmt: skip
            lines.append(f"| {' | '.join([row.name, *cells, cell(row, 'params', form='{:,}')])} |")
        first = next(row for row, metrics in of_row.items() if any(metrics))  # these controls are of the data alone
        for name in next(filter(None, of_row[first]))["splits"]["test"]["controls"]:
            if name != "shuffled_images":
                cells = [x for key in names for x in (cell(first, "splits", "test", "controls", name, key), "")]
                lines.append(f"| *{name.replace('_', ' ')}* | {' | '.join(cells)} | |")
        protocols = {f"{m['device']}, torch {m['versions']['torch']}, {m['protocol']['dtype']}, best on val by "
                     f"{m['protocol']['best_by']}" for m in found}  # fmt: skip
        took = sum(m["seconds"] for m in found) / 60
        lines += ["", f"Seeds {' / '.join(map(str, SEEDS))}; {'; '.join(sorted(protocols))}; {took:.0f} minutes.", ""]
        commands = [shlex.join(words_of(tables, table, row, "S", out, scale)) for row in table.rows]
        lines += [f"- {row.name}: `python {paper}.py {c}`" for row, c in zip(table.rows, commands, strict=True)] + [""]
        if table is tables[0] and paper in LOOKS:
            lines += LOOKS[paper](table, runs)
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# A first look at ViLTA's claims, from what its runs logged of val: the arms beside the baseline of the same seed


def curve(records: list[dict], *names: str) -> list[tuple]:
    """Records of log.jsonl -> (step, values by these names) of each evaluation on val, in its order."""
    return [(r["step"], *(r[f"val_{name}"] for name in names)) for r in records
            if all(f"val_{name}" in r for name in names)]  # fmt: skip


def at_level(points: list[tuple[float, float]], level: float, slack: float) -> float | None:
    """The second number where the first, in the order of training, is `level`: between two evaluations linearly, and
    the last time that it passes it, because a model is surer the longer it trains. Where it passes it nowhere, that of
    the nearest evaluation (of equals the last), if it is no more than `slack` away; else None."""
    for (a, u), (b, v) in reversed(list(zip(points, points[1:], strict=False))):
        if min(a, b) <= level <= max(a, b):
            return v if a == b else u + (v - u) * (level - a) / (b - a)
    near, value = min(reversed(points), key=lambda point: abs(point[0] - level), default=(math.inf, None))
    return value if abs(near - level) <= slack + 1e-9 else None


def share_needed(points: list[tuple[int, float]], goal: float, steps: int) -> float | None:
    """(step, value) of each evaluation -> the first step whose value is `goal` or more, as a share of `steps`, all
    counted from the first; None where there is no such."""
    return next((step / steps for step, value in points if value >= goal), None)


def compare_runs(arm: list[dict], baseline: list[dict]) -> list[str]:
    """log.jsonl of an arm and of the baseline -> the cells of its row: synonyms at the accuracy with which the baseline
    ends, the baseline's; share of the baseline's steps until its last value, of both accuracies of ITM."""
    cells, form = [], lambda x, none: none if x is None else f"{x:.3f}"
    _, accuracy, synonyms = curve(baseline, "mlm_accuracy", "mlm_synonyms")[-1]
    found = at_level([point[1:] for point in curve(arm, "mlm_accuracy", "mlm_synonyms")], accuracy, 0.01)
    cells += [form(found, "-"), form(synonyms, "-")]
    for name in ("itm_accuracy", "itm_accuracy_edited"):
        steps, goal = curve(baseline, name)[-1]
        share = share_needed(curve(arm, name), goal, steps)
        cells.append("> 1.00" if share is None else f"{share:.2f}")
    return cells


def first_look(table: Table, runs: dict[str, Planned]) -> list[str]:
    """Lines below ViLTA's first table. Without intervals: it says whether to look closer, not what is so."""
    head = ["", "synonyms at the baseline's accuracy", "the baseline's", "share of its steps to its itm_accuracy",
            "to its itm_accuracy_edited"]  # fmt: skip
    lines = ["A first look, no test: few seeds, single evaluations on val. Synonyms: probability of the hidden word's "
             "synonyms where the arm is as accurate on hidden words (mlm_accuracy) as the baseline at its end, a dash "
             "where it never comes within a point of that. Shares: the first evaluation that is no worse than the "
             "baseline's last, over all of the baseline's steps; its own row says what chance alone does to that.",
             "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]  # fmt: skip
    logs = {}
    for row in table.rows:
        for seed in SEEDS:
            run = runs[name_of(table, row, seed)]
            logs[row, seed] = common.read_log(run.folder / "log.jsonl") if run.state() == "done" else []
    for row in table.rows:
        cells = [compare_runs(logs[row, seed], base) if logs[row, seed] and base else ["-"] * (len(head) - 1)
                 for seed in SEEDS for base in [logs[table.rows[0], seed]]]  # fmt: skip
        lines.append(f"| {' | '.join([row.name, *(' / '.join(column) for column in zip(*cells, strict=True))])} |")
    return [*lines, ""]


LOOKS = {"vilta": first_look}  # of the runs of the first table

# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("paper", choices=PLANS)
    parser.add_argument("--out", type=Path, default=Path("runs/tables"), help="folder of all runs [runs/tables]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; of several each has one thread [1]")
    parser.add_argument("--only", default="", help="a regular expression: runs whose name it is found in")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="times all steps, for a dry run [1]")
    parser.add_argument("--list", action="store_true", help="say what is done and what is left, run nothing")
    parser.add_argument("--report", action="store_true", help="print the tables, run nothing")
    options = parser.parse_args(argv)
    runs = planned(options.paper, options.out, options.steps_scale)
    chosen = {name for name in runs if re.search(options.only, name)}
    if not chosen:
        raise UserError(f"--only {options.only}: it is in no name of a run, like {', '.join([*runs][::9])}")
    chosen |= {runs[name].start for name in chosen} - {""}
    wanted = [run for name, run in runs.items() if name in chosen]
    if options.list:
        return print(listing(wanted))
    failed = []
    if not options.report:
        options.out.mkdir(parents=True, exist_ok=True)
        failed = run_all(options.paper, [run for run in wanted if run.state() != "done"], max(1, options.jobs))
    print(report(options.paper, runs, options.out, options.steps_scale))
    if failed:
        raise UserError(f"{len(failed)} of {len(wanted)} runs are not finished: {', '.join(failed)}")


if __name__ == "__main__":
    common.run_main(main)
