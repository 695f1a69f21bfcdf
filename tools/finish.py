"""What a run of any model file says and draws when it is over."""

import shlex
import time
from pathlib import Path

import common
from tools import judge

QUIET = {"step", "lr", "grad_norm", "samples_per_s", "mfu", "data_wait", "memory_gib", "eta_s"}  # of the log: not drawn
SHOWS = {**dict.fromkeys(("retrieval", "itm"), "with the texts they were ranked for"),
         **dict.fromkeys(("vqa", "nlvr2", "ve", "vcr"), "with answers")}  # fmt: skip
NEXT = {**dict.fromkeys(("retrieval", "itm"), "--score PICTURE TEXT --init"),
        "vqa": "--ask PICTURE QUESTION --init",
        **dict.fromkeys(("nlvr2", "ve", "vcr"), "--eval-only")}  # fmt: skip


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
