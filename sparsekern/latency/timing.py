"""Timing of calls on a device."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import perf_counter, process_time, thread_time
from typing import Any

import torch

from sparsekern.runtimes import Runtime

# Seconds for which calls are repeated; in less time the clock and the scheduler dominate.
SHORTEST_CALLS = 1.5e-3

Run = Callable[[], Any]


class Stopwatch:
    """Measures seconds of calls on a device, including the work that they queue there.

    With a single CPU thread it measures that thread's CPU time, which other processes on a busy machine do
    not lengthen. Otherwise it measures wall time.

    Args:
        device: device of the calls.
        runtime: what the calls run in. OpenVINO computes in a thread of its own.
    """

    def __init__(self, device: torch.device, runtime: Runtime = "torch") -> None:
        self._device = device
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        single = process_time if runtime == "openvino" else thread_time
        self._clock = single if alone else perf_counter

    def seconds(self, run: Run) -> float:
        """Seconds of one call."""
        self._synchronise()
        begin = self._clock()
        run()
        self._synchronise()
        return self._clock() - begin

    def visit(self, run: Run) -> float:
        """Median seconds of at least two calls, after one warm-up call."""
        run()
        times: list[float] = []
        while len(times) < 2 or sum(times) < SHORTEST_CALLS:
            times.append(self.seconds(run))
        return statistics.median(times)

    def _synchronise(self) -> None:
        """Wait for the work that is queued on the device."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
