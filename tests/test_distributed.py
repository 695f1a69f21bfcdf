"""Several gloo processes: metrics over the exact set, sums and lists, stops that all hear of."""

import math
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from papers import ROOT

import common
import eval as scoring
from common import UserError

N = 7  # images: odd, so that shares differ


def batches(rank, world):
    for start in range(rank, N, 2 * world):
        ids = list(range(start, min(N, start + 2 * world), world))
        yield {"image_id": ids, "pixels": torch.tensor(ids, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)}


def decode(batch):
    return [f"picture number {int(p[0, 0, 0])}" for p in batch["pixels"]]


def process(rank, world, folder, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo")
    device = torch.device("cpu")
    captions = scoring.caption_split(decode, batches(rank, world))
    refs = {i: [f"picture number {i}", "another picture"] for i in range(N)}
    told = {"captions": captions, "metrics": scoring.caption_metrics(captions, refs)}
    told["sums"] = common.sum_over_processes([rank + 1, 0.5, torch.tensor(3)], device)
    told["lists"] = common.gather_lists([rank, "x"])
    tensors = torch.tensor([1.0, rank]), torch.tensor(rank + 1), torch.full((2,), 10.0 + rank)
    common.sum_tensors(*tensors[:2])
    common.share_tensor(tensors[2])
    told["tensors"] = [tensor.tolist() for tensor in tensors]
    run = common.Run(folder)
    try:  # the last process has a loss that is no number; the norm, which all share, tells the others
        loss = math.nan if rank == world - 1 else 1.0
        common.stop_if_not_finite(torch.tensor(math.nan), loss, [f"image of {rank}"], 3, run)
    except UserError as error:
        told["not_finite"] = str(error)
    torch.save(told, folder / f"{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """{(world, rank): what that process computed}, for 1, 2 and 3 processes."""
    found = {}
    for world in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"world{world}")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(process, args=(world, folder, port), nprocs=world)
        for rank in range(world):
            found[world, rank] = torch.load(folder / f"{world}-{rank}.pt")
    return found


def test_the_set_is_exact_and_the_same_on_every_process(told):
    for said in told.values():
        assert sorted(said["captions"]) == list(range(N))
        assert all(said["captions"][i] == f"picture number {i}" for i in range(N))
        assert said["metrics"] == told[1, 0]["metrics"]
    assert told[1, 0]["metrics"]["BLEU_1"] > 0.9


def test_sums_and_lists(told):
    for (world, _), said in told.items():
        assert said["sums"] == [world * (world + 1) / 2, 0.5 * world, 3.0 * world]
        assert said["lists"] == [x for rank in range(world) for x in (rank, "x")]


def test_tensors_are_added_up_and_shared_in_place(told):
    for (world, _), said in told.items():
        assert said["tensors"] == [[world, sum(range(world))], sum(range(1, world + 1)), [10, 10]]


def test_all_processes_stop_and_name_the_guilty_ones_samples(told):
    for (world, _), said in told.items():
        assert f"image of {world - 1} (1 in " in said["not_finite"] and "step 3: loss nan" in said["not_finite"]


ENDING = """
import atexit, os, torch.distributed as dist
import common

class Late:
    def __del__(self):
        print("Python shuts down")

late = Late()
atexit.register(print, "hook")

def main():
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="FREE")
    dist.init_process_group("gloo")
    raise common.UserError("mend it")

common.run_main(main)
"""


def test_a_process_of_several_ends_without_shutting_python_down(tmp_path):
    """gloo's threads outlive destroy_process_group where DistributedDataParallel was used; one that meets a Python that
    shuts down aborts the process, now and then. What must be done at exit (ending workers, flushing) is still done."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run([sys.executable, "-c", ENDING.replace("FREE", str(port))], cwd=ROOT, capture_output=True,
                          text=True)  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "hook\n") and "error: mend it" in done.stderr
