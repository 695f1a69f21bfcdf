"""What the benchmarks share: medians of alternating runs, and a line on the machine."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common


def medians(runs: dict, repeats: int = 5) -> list[float]:
    """Median seconds of each function of {name: function}. They take turns (A B A B ...), so that what else the machine
    does hits all of them alike; a first turn warms up and does not count."""
    times = []
    for _ in range(1 + max(5, repeats)):
        times.append([])
        for run in runs.values():
            start = time.perf_counter()
            run()
            times[-1].append(time.perf_counter() - start)
    return [statistics.median(column) for column in zip(*times[1:], strict=True)]


def compare(title: str, runs: dict, repeats: int = 5) -> list[float]:
    """Print the medians of two functions, and how many times as fast the first is; returns the medians."""
    ours, theirs = seconds = medians(runs, repeats)
    (a, b) = runs
    print(f"{title:<28} {a} {ours:9.4f} s   {b} {theirs:9.4f} s   {theirs / ours:6.2f} x", flush=True)
    return seconds


def describe_machine() -> str:
    """Processor, cores that this process may use, torch's threads and version."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cpu}, {cores} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def flops_of(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def peak_memory_of(run, device: torch.device) -> float:
    """GiB at most during one run, with what was there before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the largest resident size counts from here
    except OSError:
        pass
    run()
    return common.peak_memory_gib()


def finished(run, device: torch.device):
    """`run`, waiting for the GPU where there is one."""

    def timed():
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return timed


def product(cfg, machine: common.Machine):
    """(a run of plain matrix products of the network's shape, their FLOPs)."""
    rows, times = (16384, 50) if machine.device.type == "cuda" else (2048, 10)
    a = torch.rand(rows, cfg.width, device=machine.device, dtype=machine.dtype)
    b = torch.rand(cfg.width, cfg.mlp or 4 * cfg.width, device=machine.device, dtype=machine.dtype)
    return lambda: [a @ b for _ in range(times)], times * 2 * a.numel() * b.size(1)


def measure(runs: dict, flops: dict, samples: int, cfg, machine: common.Machine, repeats: int) -> None:
    """A line for each run: medians, taking turns with the matrix product."""
    memory = {name: peak_memory_of(run, machine.device) for name, run in runs.items()}
    many, flops_of_many = product(cfg, machine)
    *seconds, of_many = medians({k: finished(run, machine.device) for k, run in {**runs, "": many}.items()}, repeats)
    name = torch.cuda.get_device_name() if machine.device.type == "cuda" else ""
    peak = next((flops for gpu, flops in common.PEAKS.items() if gpu in name), 0.0)
    for name, took in zip(runs, seconds, strict=True):
        rate = flops[name] / took
        print(f"{name:<22} {took:>9.4f} s {samples / took:>9.2f} samples/s {flops[name] / 1e9:>10.1f} GFLOP "
              f"{rate * of_many / flops_of_many:>7.1%} of matmul {memory[name]:>7.2f} GiB"
              + (f" {rate / peak:>7.1%} MFU" if peak else ""), flush=True)  # fmt: skip
    first, second = seconds
    print(f"{'':<22} the second takes {second / first:.2f} times as long; a matrix product reaches "
          f"{flops_of_many / of_many / 1e9:,.0f} GFLOP/s", flush=True)  # fmt: skip
