"""Timing several calls in turns, so that a slow phase of the machine affects all of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch

# Least seconds of a measurement; calls are repeated, as clock and scheduler dominate shorter measurements.
SHORTEST = 0.01


@dataclass(frozen=True)
class Spread:
    """Median, quartiles, 10th and 90th percentile."""

    median: float
    q1: float
    q3: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of ``values``, at least one."""
        return cls(*map(float, np.quantile(values, (0.5, 0.25, 0.75, 0.1, 0.9))))


def interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    *,
    shortest: float = SHORTEST,
) -> dict[str, list[float]]:
    """Time every candidate once per round; each round begins with another candidate.

    A warm-up calls each candidate until one measurement takes ``shortest`` seconds, which gives the number of
    calls per measurement. Garbage collection is off during the timing.

    Args:
        candidates: the calls, by name.
        rounds: number of rounds.
        device: device of the calls; it is synchronised before each clock reading.
        shortest: least seconds of one measurement.

    Returns:
        Seconds of one call in each round, by candidate.
    """
    repeats = {name: _warm_up(run, device, shortest) for name, run in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(_seconds(candidates[name], repeats[name], device))
    finally:
        if collecting:
            gc.enable()
    return times


def ratios(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """The ratios ``mine / theirs`` of each round."""
    return [a / b for a, b in zip(mine, theirs, strict=True)]


def _warm_up(run: Callable[[], Any], device: torch.device, shortest: float) -> int:
    _seconds(run, 1, device)
    calls = 1
    while (taken := calls * _seconds(run, calls, device)) < shortest:
        calls = max(2 * calls, round(calls * shortest / max(taken, 1e-9)))
    return calls


def _seconds(run: Callable[[], Any], calls: int, device: torch.device) -> float:
    _synchronise(device)
    begin = perf_counter()
    for _ in range(calls):
        run()
    _synchronise(device)
    return (perf_counter() - begin) / calls


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
