"""What a case becomes before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparsekern.bench.calls import Run

OURS = "sparsekern"


@dataclass
class Contest:
    """A case, ready to be timed.

    Attributes:
        sides: what is called, by name; the first, :data:`OURS`, is compared with all others, above all with
            the second.
        moved: bytes that each side has to move at least; empty where memory is not the limit.
        elements: of all parameters.
        wrong: to be called once, before anything is timed: how the result of our side is wrong, None when it
            is right.
    """

    sides: dict[str, Run]
    moved: dict[str, int]
    elements: int
    wrong: Callable[[], str | None]
