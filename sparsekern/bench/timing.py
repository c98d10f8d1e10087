"""Timing several calls in turns, so that a slower spell of the machine hits all of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch

# Calls are repeated until they take this long: less is mostly the clock and the scheduler.
SHORTEST = 0.01


@dataclass(frozen=True)
class Spread:
    """Median, quartiles, and what all but a tenth on either side lies between."""

    median: float
    q1: float
    q3: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(*map(float, np.quantile(values, (0.5, 0.25, 0.75, 0.1, 0.9))))


def interleaved(
    sides: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, *, shortest: float = SHORTEST
) -> dict[str, list[float]]:
    """Seconds of a call of every side, round after round, each beginning with another side.

    Warms up first: every side is called until it has taken ``shortest`` seconds, which also tells how many
    calls make one measurement. Garbage is not collected meanwhile.
    """
    repeats = {name: _warm_up(run, device, shortest) for name, run in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(_seconds(sides[name], repeats[name], device))
    finally:
        if collecting:
            gc.enable()
    return times


def ratios(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Round by round."""
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
