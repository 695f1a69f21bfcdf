"""Stop and go on, for every paper: signals, resuming bit for bit, losses that are no numbers, disks that are full."""

import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from papers import PAPERS, RANDOM, ROOT, UPDATES, run, toy

import common
import data
import eval as scoring
from common import UserError

SEVEN = "--steps 7 --eval-every 3 --log-every 1 --val-items 6 --test-scenes 6 --dropout 0.1"


def seven(paper, *more):
    """Flags of seven steps with all that is random in them, and an evaluation after every third."""
    return toy(paper, *SEVEN.split(), *RANDOM.get(paper, "").split(), *more)


@pytest.fixture(params=PAPERS, scope="module")
def paper(request):
    return request.param


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """What a shell starts in the background ignores Ctrl-C; these tests may be started so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def kill_after(monkeypatch, step: int, signum=signal.SIGTERM):
    """This process sends itself a signal when `step` is done."""
    original = common.Logger.step

    def log(self, number, *args, **named):
        original(self, number, *args, **named)
        if number == step:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(common.Logger, "step", log)


def flat(state, path=()):
    """{path: tensor} of nested dictionaries and lists: the state of an optimizer, or of two."""
    if torch.is_tensor(state):
        return {path: state}
    parts = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {k: x for name, part in parts for k, x in flat(part, (*path, name)).items()}


def numbers(path):
    """What a run leaves that must not depend on whether it was stopped: weights, optimizer, logged losses, metrics."""
    weights = common.read_tensors(path / "last" / "model.safetensors")
    moments = flat(common.read_tensors(path / "last" / "state.pt")["optimizer"])
    records = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    clock = ("samples_per_s", "data_wait", "memory_gib", "eta_s")
    records = [{k: v for k, v in record.items() if k not in clock} for record in records]
    return weights, moments, records, json.loads((path / "metrics.json").read_text())["splits"]


def same(a, b):
    assert all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    assert a[1].keys() == b[1].keys() and all(torch.equal(a[1][k], b[1][k]) for k in a[1]) and len(a[1]) > 9
    assert a[2] == b[2] and a[3] == b[3]


@pytest.fixture(scope="module")
def whole(paper, tmp_path_factory):
    """Seven steps at one go, an evaluation after every third, no workers."""
    path = tmp_path_factory.mktemp("whole") / "run"
    run(paper, *seven(paper, "--out", path))
    return numbers(path)


@pytest.mark.parametrize("workers, step", [(0, 1), (0, 2), (2, 4), (0, 7)])
def test_stopped_and_resumed_is_never_stopped(paper, whole, tmp_path, monkeypatch, workers, step):
    """A stop before the first evaluation, at one, between two, in the last step; with two workers and without."""
    out = tmp_path / "run"
    kill_after(monkeypatch, step)
    with pytest.raises(common.Stopped) as stop:
        run(paper, *seven(paper, "--workers", workers, "--out", out))
    assert stop.value.signum == signal.SIGTERM
    saved = (out / "last").resolve().name  # the processes agree on a stop in the step after the signal
    assert saved == f"step_{min(step + 1, 7)}" and f"{saved} is saved" in str(stop.value)
    assert f"--resume {out}" in str(stop.value)
    assert not multiprocessing.active_children(), "workers end with the run"
    monkeypatch.undo()
    run(paper, "--resume", out, "--workers", workers, "--device", "cpu")
    same(whole, numbers(out))


def test_resume_from_the_best_step_goes_back(paper, whole, tmp_path, monkeypatch):
    """RUN/step_N other than the last: what was logged and saved after it makes way."""
    out = tmp_path / "run"
    kill_after(monkeypatch, 4)
    with pytest.raises(common.Stopped):
        run(paper, *seven(paper, "--out", out))
    assert (out / "best").resolve().name == "step_3" and (out / "last").resolve().name == "step_5"
    monkeypatch.undo()
    run(paper, "--resume", out / "step_3", "--device", "cpu", "--workers", 0)
    same(whole, numbers(out))


def test_evaluating_more_often_changes_nothing_else(paper, whole, tmp_path):
    out = tmp_path / "run"
    run(paper, *seven(paper, "--eval-every", 1, "--out", out))
    weights, _, records, _ = numbers(out)
    assert all(torch.equal(whole[0][k], weights[k]) for k in weights)
    losses = [[r for r in found if "lr" in r] for found in (whole[2], records)]
    assert losses[0] == losses[1] and len(losses[0]) == 7


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_whole_family_hears_the_signal(paper, tmp_path, signum, status):
    """Ctrl-C reaches workers as well as the program, and so does a scheduler's SIGTERM: still saved, in one message."""
    out = tmp_path / "run"
    command = [sys.executable, f"{paper}.py", *toy(paper, "--steps", 5000, "--log-every", 1, "--workers", 2)]
    program = subprocess.Popen([*command, "--out", str(out)], cwd=ROOT, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    while not program.stdout.readline().startswith("step "):
        assert program.poll() is None, program.stderr.read()
    os.killpg(program.pid, signum)
    _, said = program.communicate(timeout=60)
    assert program.returncode == status and "Traceback" not in said, said
    step = int(re.search(r"stopped; step_(\d+) is saved", said)[1])
    assert said.strip().endswith(f"python {paper}.py --resume {out}")
    checkpoint, _ = common.find_checkpoint(str(out), paper, prefer="last")
    assert checkpoint.name == f"step_{step}" and common.read_json(checkpoint / "meta.json")["step"] == step


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_final_evaluation(paper, whole, tmp_path, monkeypatch, signum):
    """Training is over and saved: --resume does the evaluation alone."""
    out, before = tmp_path / "run", signal.signal(signal.SIGTERM, common.interrupt)  # as run_main sets it
    for name in ("evaluate_captions", "evaluate_examples", "evaluate_retrieval"):  # whichever comes first
        monkeypatch.setattr(scoring, name, lambda *_, **__: os.kill(os.getpid(), signum))
    with pytest.raises(common.Stopped, match="step_7 is saved") as stop:
        run(paper, *seven(paper, "--out", out))
    signal.signal(signal.SIGTERM, before)
    assert stop.value.signum == signum
    monkeypatch.undo()
    run(paper, "--resume", out, "--device", "cpu", "--workers", 0)
    same(whole, numbers(out))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("a picture of val cannot be read")])
def test_an_evaluation_that_fails_costs_no_training(paper, whole, tmp_path, monkeypatch, error):
    """The step is saved before val is looked at; --resume begins with that look."""
    out, looks = tmp_path / "run", []

    def spoilt(original):
        def look(*args, **named):
            looks.append((out / "last").resolve().name)
            if looks[-1] == "step_6":
                raise error
            return original(*args, **named)

        return look

    for name in ("caption_split", "predict_split", "score_gallery"):  # whichever looks at its val
        monkeypatch.setattr(scoring, name, spoilt(getattr(scoring, name)))
    with pytest.raises((common.Stopped, UserError), match="step_6 is saved. Go on with:\n.*--resume"):
        run(paper, *seven(paper, "--out", out))
    assert (out / "last").resolve().name == "step_6" and (out / "best").resolve().name == "step_3"
    assert list(dict.fromkeys(looks)) == ["step_3", "step_6"]
    monkeypatch.undo()
    run(paper, "--resume", out, "--device", "cpu", "--workers", 0)
    same(whole, numbers(out))


def test_a_second_ctrl_c_does_not_wait(monkeypatch):
    clock = iter([10.0, 10.5, 13.0])  # torchrun's echo of the first one half a second later; the user's second one
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with common.StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "handlers are given back"


def test_stopped_before_anything_was_saved(paper, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "train_loader", interrupted)
    with pytest.raises(common.Stopped, match="before the first checkpoint"):
        run(paper, *toy(paper, "--out", tmp_path / "run"))


def test_a_loss_that_is_no_number_stops_the_run(paper, tmp_path, monkeypatch):
    """The update is not made, the samples are named, and the checkpoint before it is whole."""
    original, out = common.linear_schedule, tmp_path / "run"
    rates = lambda *args: math.nan if (out / "step_3").exists() else original(*args)  # noqa: E731  spoils the fourth step
    monkeypatch.setattr(common, "linear_schedule", rates)
    with pytest.raises(UserError, match="loss nan.*checkpoint: step_3.* in .*not_finite.json.*--init.*--lr") as stop:
        run(paper, *seven(paper, "--out", out))
    step = 4 if UPDATES.get(paper, 1) > 1 else 5  # the first update of step 4 spoils the weights, the next one shows it
    images = 20 // common.read_json(out / "config.json")["captions_per_image"]
    assert re.match(rf"step {step}: .*\({images} in ", str(stop.value))
    told = common.read_json(out / "not_finite.json")
    pictures = data.TrainBatches(40, images, seed=0, start_step=step - 1, steps=step)
    assert told["step"] == step and told["image_ids"] == [str(index) for _, index in next(iter(pictures))]
    checkpoint, _ = common.find_checkpoint(str(out), paper, prefer="last")
    assert all(t.isfinite().all() for t in common.read_tensors(checkpoint / "model.safetensors").values())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_disk_that_refuses_keeps_the_checkpoint_before(paper, whole, tmp_path, monkeypatch, error):
    import safetensors.torch

    original, out = safetensors.torch.save_file, tmp_path / "run"

    def save_file(tensors, path):
        if "step_6" in str(path):
            Path(path).write_bytes(b"half a file")
            raise error
        original(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(UserError, match=f"(?s)step_6 could not be saved.*{error.strerror}.*step_3 is saved. Go on"):
        run(paper, *seven(paper, "--out", out))
    assert sorted(p.name for p in out.glob("step_*")) == ["step_3"] and (out / "best").resolve().name == "step_3"
    monkeypatch.undo()
    run(paper, "--resume", out, "--device", "cpu", "--workers", 0)
    same(whole, numbers(out))


@pytest.mark.slow
def test_two_processes_stop_and_go_on(paper, tmp_path):
    """torchrun hears SIGTERM: both processes end their step, one checkpoint, and the rest gives the same numbers."""
    flags = seven(paper, "--steps", 60, "--eval-every", 60, "--workers", 1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"{paper}.py"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    subprocess.run([*torchrun, *flags, "--out", str(whole)], cwd=ROOT, check=True, capture_output=True)
    program = subprocess.Popen([*torchrun, *flags, "--out", str(stopped)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    while not program.stdout.readline().startswith("step "):
        assert program.poll() is None, program.stderr.read()
    program.send_signal(signal.SIGTERM)
    _, said = program.communicate(timeout=120)
    assert "is saved. Go on with:" in said and "--nproc_per_node=2" in said, said
    assert 0 < common.read_json(stopped / "last" / "meta.json")["step"] < 60
    done = subprocess.run([*torchrun, "--resume", str(stopped)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same(numbers(whole), numbers(stopped))
