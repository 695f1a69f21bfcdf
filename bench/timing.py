"""What the benchmarks share: medians of alternating runs, and a line on the machine."""

from __future__ import annotations

import os
import platform
import statistics
import time
from pathlib import Path

import torch


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
