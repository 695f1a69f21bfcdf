"""kill -9 at random moments of training, saving and evaluation, then --resume: bit for bit the run that never died.

    python tests/kills.py                     all four files, twenty kills each
    python tests/kills.py soho --times 6 --seed 3

A run of seven toy steps with everything random in it is done once from end to end. Then it is started again and again,
each time killed at another moment: in a training step; while a checkpoint is written; in the evaluation after it. What
is left goes on, with --resume where a checkpoint was complete, else by the first command, and in the end its weights,
optimizer, logged losses and metrics are compared with those of the first run. Runs are forked from this process, so
that a kill costs a second or two.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from papers import PAPERS  # noqa: E402
from test_stop import numbers, same, seven  # noqa: E402

import common  # noqa: E402

MOMENTS = ("training", "saving", "evaluation")


def die_in(seconds: float) -> None:
    """Not a signal that is heard: nothing is tidied up."""
    threading.Thread(target=lambda: (time.sleep(seconds), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()


def hooked(on_step, before_save, after_save) -> None:
    """Calls these after each step, before and after each checkpoint."""
    step, save = common.Logger.step, common.Run.save

    def stepped(self, number, *rest, **named):
        step(self, number, *rest, **named)
        on_step()

    def saved(self, *rest, **named):
        before_save()
        save(self, *rest, **named)
        after_save()

    common.Logger.step, common.Run.save = stepped, saved


def child(argv: list[str], paper: str, log: Path, moment: str = "", after: int = 0, delay: float = 0.0,
          times: list | None = None) -> None:
    """One run. moment: dies `delay` seconds after event number `after` of its kind. times: gets (kind, when) of all."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        seen = dict.fromkeys(MOMENTS, 0)

        def event(kind: str):
            def happens() -> None:
                seen[kind] += 1
                if times is not None:
                    times.append((kind, time.perf_counter()))
                if kind == moment and seen[kind] == after:
                    die_in(delay)

            return happens

        hooked(*map(event, MOMENTS))
        status = 0
        try:
            importlib.import_module(paper).main(argv)
        except BaseException as error:  # the parent asks for the status alone
            traceback.print_exc()
            status = 2 if isinstance(error, common.UserError) else 1
        sys.stdout.flush()
        os._exit(status)


def ended(context, *rest, **named) -> int:
    """A run from start to end, in a process of its own -> its exit status; -9 where it was killed."""
    process = context.Process(target=child, args=rest, kwargs=named)
    process.start()
    process.join()
    return process.exitcode


def kill_often(paper: str, times: int, seed: int, folder: Path) -> list[str]:
    """What went wrong, a line each."""
    context, luck, log = multiprocessing.get_context("fork"), random.Random(f"{seed} {paper}"), folder / "log"
    with context.Manager() as manager:
        events = manager.list()
        if ended(context, seven(paper, "--out", folder / "whole"), paper, log, times=events):
            return [f"{paper}: the run that nobody kills failed:\n{log.read_text()}"]
        events = list(events)
    whole = numbers(folder / "whole")
    told, wrong, n_dead = [], [], 0
    for number in range(times):
        moment, out = MOMENTS[number % 3], folder / f"run{number}"
        after = luck.randint(1, sum(kind == moment for kind, _ in events))
        at = [i for i, (kind, _) in enumerate(events) if kind == moment][after - 1]
        until = events[at + 1][1] if at + 1 < len(events) else events[at][1] + 1.0
        delay = luck.random() * (until - events[at][1])
        how = f"{paper}: {moment} {after}, {delay * 1000:.0f} ms"
        status = ended(context, seven(paper, "--out", out), paper, log, moment, after, delay)
        left = sorted(path.name for path in out.iterdir()) if out.exists() else []
        n_dead += status == -signal.SIGKILL
        if not (out / "metrics.json").exists() or status:
            whole_checkpoint = (out / "last").exists()
            argv = ["--resume", str(out), "--device", "cpu"] if whole_checkpoint else seven(paper, "--out", out)
            if status := ended(context, list(map(str, argv)), paper, log):
                wrong.append(f"{how}: {' '.join(left)}; going on ended with {status}:\n{log.read_text()[-2000:]}")
                continue
        try:
            same(whole, numbers(out))
            told.append("same")
        except (AssertionError, OSError, ValueError, KeyError) as error:
            wrong.append(f"{how}: not the same ({type(error).__name__} {error}); left by the kill: {' '.join(left)}")
    print(f"{paper}: {times} kills, {n_dead} before the end, {len(told)} went on to the same numbers", flush=True)
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("papers", nargs="*", help=f"{', '.join(PAPERS)}; default: all")
    parser.add_argument("--times", type=int, default=20, help="kills of each file")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args(argv)
    if unknown := set(options.papers) - {*PAPERS}:
        parser.error(f"{', '.join(unknown)}: give some of {', '.join(PAPERS)}")
    torch.set_num_threads(1)
    wrong = []
    for paper in options.papers or PAPERS:
        importlib.import_module(paper)
        with tempfile.TemporaryDirectory() as folder:
            wrong += kill_often(paper, options.times, options.seed, Path(folder))
    print(*wrong, sep="\n")
    return len(wrong) > 0


if __name__ == "__main__":
    sys.exit(main())
