"""A benchmark case, prepared for timing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparsekern.bench.calls import Run

OURS = "sparsekern"


@dataclass
class Comparison:
    """A case whose candidates are ready to be timed.

    Attributes:
        candidates: the timed call of each candidate, by name. The first, :data:`OURS`, is compared with all
            others; the second is its main competitor.
        moved: the least bytes that each candidate must move; empty where memory is not the limit.
        elements: number of elements of all parameters.
        validate: describes the error in sparsekern's result; None if the result is right. It is called once,
            before the timing.
    """

    candidates: dict[str, Run]
    moved: dict[str, int]
    elements: int
    validate: Callable[[], str | None]
