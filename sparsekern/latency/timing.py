"""A stopwatch for many short calls, and for a few networks that take turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from time import perf_counter, thread_time
from typing import Any

import torch

# Calls are repeated until they have taken this long: less is mostly the clock and the scheduler.
SHORTEST_CALLS = 1.5e-3
SHORTEST_PASSES = 2e-2

Run = Callable[[], Any]


class Stopwatch:
    """Seconds of calls on a device, waiting for the work that they queue there.

    Where a single CPU thread computes, it is that thread's own time, which other processes on a busy
    machine do not lengthen; wall time elsewhere.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self._clock = thread_time if alone else perf_counter

    def seconds(self, run: Run, repeats: int = 1) -> float:
        """Mean seconds of ``repeats`` calls."""
        self._synchronise()
        begin = self._clock()
        for _ in range(repeats):
            run()
        self._synchronise()
        return (self._clock() - begin) / repeats

    def visit(self, run: Run) -> float:
        """Median seconds of a few calls, after one that warms up."""
        run()
        times: list[float] = []
        while len(times) < 2 or sum(times) < SHORTEST_CALLS:
            times.append(self.seconds(run))
        return statistics.median(times)

    def turns(self, runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
        """Seconds of each of ``runs`` in every round, all in turn, so that a slow spell hits them alike."""
        repeats = {}
        for name, run in runs.items():
            run()
            repeats[name] = max(1, round(SHORTEST_PASSES / self.seconds(run)))
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(self.seconds(run, repeats[name]))
        return times

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
