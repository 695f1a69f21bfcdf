"""What kill -9 leaves goes on: a few moments of tests/kills.py, and one process of two."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from papers import PAPERS, ROOT
from test_stop import seven

import common
from common import UserError
from tools import finish


@pytest.mark.slow
@pytest.mark.parametrize("paper", PAPERS)
def test_killed_and_resumed_is_never_killed(paper):
    """In a process of its own, which forks its runs before any thread is there. KILLS_SEED: other moments."""
    seed = os.environ.get("KILLS_SEED", "0")
    command = [sys.executable, str(ROOT / "tests" / "kills.py"), paper, "--times", "6", "--seed", seed]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0 and "6 went on to the same numbers" in done.stdout, f"seed {seed}: {done.stdout}"


@pytest.mark.slow
@pytest.mark.parametrize("paper", PAPERS)
def test_one_process_of_two_dies(paper, tmp_path):
    """Under torchrun: the other one says so, with how to go on, and the run goes on from its checkpoint."""
    out, log = tmp_path / "run", tmp_path / "log"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    start = [*torchrun, str(ROOT / f"{paper}.py")]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    with open(log, "w") as file:
        command = [*start, *seven(paper, "--steps", 5000, "--eval-every", 3, "--out", out)]
        family = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=env)
    began = time.monotonic()
    while not (out / "best").exists() and family.poll() is None and time.monotonic() - began < 300:
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(family.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) == 2, log.read_text()
    os.kill(int(children[1]), signal.SIGKILL)
    assert family.wait(120) != 0
    told = log.read_text()
    saved = (out / "last").resolve().name
    assert "error: another process of this run has ended" in told and f"{saved} is saved. Go on with:" in told
    assert "[rank0]: Traceback" not in told
    more = int(saved.removeprefix("step_")) + 2
    config = common.read_json(out / "config.json")
    common.write_json(out / "config.json", {**config, "steps": more})
    subprocess.run([*start, "--resume", str(out)], check=True, cwd=ROOT, env=env, timeout=300, capture_output=True)
    assert (out / "last").resolve().name == f"step_{more}" and (out / "metrics.json").exists()
    steps = [record["step"] for record in common.read_log(out / "log.jsonl") if "lr" in record]
    assert steps == list(range(1, more + 1))
    shutil.rmtree(out)


@pytest.mark.parametrize("error, is_lost", [
    (RuntimeError("[/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer"), True),
    (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), True),
    (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation"), True),
    (torch.distributed.DistBackendError("NCCL error"), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    (RuntimeError("gloo: shapes differ"), False),
])  # fmt: skip
def test_what_a_lost_process_looks_like(error, is_lost, tmp_path, monkeypatch):
    from types import SimpleNamespace

    cfg = SimpleNamespace(captions_per_image=1, batch=2, steps=1, resume="x")
    monkeypatch.setattr(common, "announce", lambda *_: None)

    def train(*_):
        raise error

    machine = SimpleNamespace(is_main=True, processes=2)
    (tmp_path / "step_3").mkdir()
    (tmp_path / "last").symlink_to("step_3")
    with pytest.raises(UserError if is_lost else RuntimeError) as raised:
        finish.carry_out("tden", "", cfg, tmp_path / "step_3", SimpleNamespace(), None, machine, 0.0, train, None, "")
    if is_lost:
        goes_on = r"another process .*\nstep_3 is saved\. Go on with:\ntorchrun --nproc_per_node=2"
        assert re.search(goes_on, str(raised.value))
    else:
        assert raised.value is error


def test_a_log_of_a_run_without_a_checkpoint_makes_way(tmp_path):
    run = common.Run(tmp_path)
    run.log({"step": 1, "lr": 0.1})
    assert run.go_on(None, None) == (0, -1.0, False)
    assert common.read_log(tmp_path / "log.jsonl") == []
