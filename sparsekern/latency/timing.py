"""A stopwatch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import perf_counter, thread_time
from typing import Any

import torch

# Calls are repeated until they have taken this long: less is mostly the clock and the scheduler.
SHORTEST_CALLS = 1.5e-3

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

    def seconds(self, run: Run) -> float:
        """Seconds of a call."""
        self._synchronise()
        begin = self._clock()
        run()
        self._synchronise()
        return self._clock() - begin

    def visit(self, run: Run) -> float:
        """Median seconds of a few calls, after one that warms up."""
        run()
        times: list[float] = []
        while len(times) < 2 or sum(times) < SHORTEST_CALLS:
            times.append(self.seconds(run))
        return statistics.median(times)

    def _synchronise(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
