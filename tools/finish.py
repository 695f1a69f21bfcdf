"""What a run of any model file says and draws when it is over."""

import re
import shlex
import time
from pathlib import Path

import torch.distributed as dist

import common
from common import UserError
from tools import judge

QUIET = {"step", "lr", "grad_norm", "samples_per_s", "mfu", "data_wait", "memory_gib", "eta_s"}  # of the log: not drawn
SHOWS = {**dict.fromkeys(("retrieval", "itm"), "with the texts they were ranked for"),
         **dict.fromkeys(("vqa", "nlvr2", "ve", "vcr"), "with answers")}  # fmt: skip
NEXT = {**dict.fromkeys(("retrieval", "itm"), "--score PICTURE TEXT --init"),
        "vqa": "--ask PICTURE QUESTION --init",
        **dict.fromkeys(("nlvr2", "ve", "vcr"), "--eval-only")}  # fmt: skip


def pictures_of(cfg, corpus, machine: common.Machine, least: int) -> int:
    """Pictures per step over all processes; UserError without a training split or where a process has less than
    `least` of them."""
    if "train" not in corpus.splits:
        raise UserError(f"{corpus.name} has no training split, only {', '.join(corpus.splits) or 'all empty'}")
    k, pictures = cfg.captions_per_image, cfg.batch // cfg.captions_per_image
    if pictures < machine.processes * least:
        raise UserError(f"--batch {cfg.batch}: too small for {k} captions a picture on {machine.processes} processes; "
                        "mismatched texts come from other pictures, so each process needs two")  # fmt: skip
    return pictures


def carry_out(name: str, title: str, cfg, checkpoint, model, corpus, machine, started: float, train, evaluate, task):
    """A run from its folder to what it says at the end: `train`, then `evaluate` of the best checkpoint; both are the
    model file's. checkpoint: the one that --resume or --init name."""
    k = cfg.captions_per_image
    title += f": {cfg.steps} steps of {cfg.batch // k} pictures" + f" x {k} captions" * (k > 1)
    run = common.Run(checkpoint.parent) if cfg.resume else common.Run.create(name, cfg, machine)
    if getattr(model, "answers", ()) and machine.is_main:
        common.write_json(run.path / "answers.json", list(model.answers))
    common.announce(title, model, cfg, machine, corpus, run)
    try:
        train(cfg, model, corpus, machine, run, checkpoint if cfg.resume else None)
        best = (run.path / "best").resolve()  # chosen on val
        common.load_model_weights(model, best)
        columns = evaluate(cfg, model, best, corpus, machine, run.path, started)
    except (KeyboardInterrupt, UserError) as error:
        raise common.stopped(run, machine, why=error) from None
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        why = UserError("another process of this run has ended or cannot be reached; its own message says why")
        raise common.stopped(run, machine, why=why) from None
    if machine.is_main:
        tell(columns, run, task, started, f"{name}.py")


def is_lost_process(error: RuntimeError) -> bool:
    """Is it what an exchange raises where another process is gone? gloo has no error of its own for it."""
    gone = re.search(r"onnection (reset|closed|refused)|imed out|Broken pipe|Socket closed", str(error))
    return isinstance(error, dist.DistError) or ("gloo" in str(error) and gone is not None)


def record(name: str, cfg, asked, checkpoint, folder, started: float, splits: dict, **protocol) -> None:
    """metrics.json of an evaluation: `asked` is the tools.exam.Exam that made it, protocol what is to be known beside
    the paper's own settings."""
    if asked.machine.is_main:
        protocol = {**common.own_settings(cfg), **protocol, "notes": asked.corpus.notes,
                    "checkpoint": common.how_chosen(checkpoint), "best_by": asked.best_by}  # fmt: skip
        seconds = time.perf_counter() - started
        common.write_metrics(folder, name, cfg, asked.machine, asked.model, seconds, protocol, splits)


def tell(columns: dict, run: common.Run, task: str, started: float, program: str) -> None:
    """The table, a sentence about what it shows, the files, and the command that may follow."""
    print(f"\n{common.table(columns)}\n")
    seen = [columns.get(name, {}) for name in ("test", "test, shuffled")]
    if all("caption_true" in column for column in seen):
        print(f"{judge.how_it_sees(*seen)}\n")
    if all("true@1" in column for column in seen):
        print(f"{judge.how_it_ranks(*seen)}\n")
    print(f"{run.path / 'samples.png'}: test pictures {SHOWS.get(task, 'with captions')}")
    if (run.path / "ranking.png").exists():
        print(f"{run.path / 'ranking.png'}: the picture that was ranked first for each text")
    print(f"{run.path / 'metrics.json'}: this table\n{curves(run.path / 'curves.png', run.path / 'log.jsonl')}")
    print(f"go on: python {program} {NEXT.get(task, '--caption PICTURE --init')} {shlex.quote(str(run.path))}")
    print(f"{time.perf_counter() - started:.0f} seconds in all")


def curves(path: Path, log: Path) -> str:
    """Draw every loss and val metric of log.jsonl; returns what to tell the user (matplotlib is optional)."""
    try:
        import matplotlib
    except ImportError:
        return "no curves.png: matplotlib is not installed"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = common.read_log(log)
    names = list(dict.fromkeys(k for r in records for k in r if k not in QUIET))
    rows = -(-len(names) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(14, 2.8 * rows), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(r["step"], r[name]) for r in records if name in r]
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return str(path)
