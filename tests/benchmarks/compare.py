"""Compare two ways of computing one thing, in one process: equality first, then time, alternately."""

import os
import platform
import statistics
import time
from collections.abc import Callable

import torch


def compare(name: str, straightforward: Callable, ours: Callable, check: Callable, rounds: int = 7) -> float:
    """Assert `check(straightforward(), ours())`, then print and return the ratio of their median CPU times."""
    check(straightforward(), ours())
    times: dict[Callable, list[float]] = {straightforward: [], ours: []}
    for _ in range(rounds):
        for run in (straightforward, ours):
            start = time.process_time()
            run()
            times[run].append(time.process_time() - start)
    slow, fast = (statistics.median(times[run]) for run in (straightforward, ours))
    low, high = (
        min(times[straightforward]) / max(times[ours]),
        max(times[straightforward]) / min(times[ours]),
    )
    print(
        f"{name:<44} {slow * 1e3:9.2f} ms {fast * 1e3:9.2f} ms  {slow / fast:5.1f}x  ({low:.1f} to {high:.1f}), equal"
    )
    return slow / fast


def header() -> None:
    """What the numbers below were measured on."""
    print(
        f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, "
        f"load {os.getloadavg()[0]:.1f}; median CPU time of straightforward and ours, ratio (range)"
    )
