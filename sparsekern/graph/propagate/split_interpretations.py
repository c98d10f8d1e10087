"""Which reading of ambiguous splits leaves most to prune: found by trying.

``reshape(b, n, 3, heads, size)`` of one dimension may mean heads that go whole or sizes that all
heads share. The rules take one reading for all splits of a module; where what it ties together
is frozen by something else (attention scales by the head's size), the next one is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sparsekern.graph.propagate.interpret import Tracked
from sparsekern.graph.propagate.records import Records
from sparsekern.graph.propagate.slots import Slots


class Round(NamedTuple):
    """Tensors with fresh slots, and what one interpretation over all graphs made of them."""

    tensors: Sequence[Tracked]
    slots: Slots
    records: Records


def best_reading(attempt: Callable[[Mapping[str, int]], Round]) -> Round:
    """The round, of those that ``attempt`` makes for the readings it is given, to go on with."""
    best = attempt({})
    chosen: dict[str, int] = {}
    slots = _of_modules(best.records)
    readings = {module: max(n for _, n in splits) for module, splits in slots.items()}
    for reading in range(1, max(readings.values(), default=0)):
        free = _free(best)
        stuck = [m for m, n in readings.items() if n > reading and free[m] < 1]
        if not stuck:
            break
        tried = attempt({**chosen, **dict.fromkeys(stuck, reading)})
        now = _free(tried)
        better = [m for m in stuck if now.get(m, 0.0) > free[m]]
        chosen |= dict.fromkeys(better, reading)
        if better == stuck:
            best = tried
        elif better:
            best = attempt(chosen)
    return best


def _of_modules(records: Records) -> dict[str, list[tuple[np.ndarray, int]]]:
    found: dict[str, list[tuple[np.ndarray, int]]] = {}
    for module, ids, readings in records.splits:
        found.setdefault(module, []).append((ids, readings))
    return found


def _free(made: Round) -> dict[str, float]:
    """By module the share of the slots at its splits that are free."""
    _, reasons = made.slots.classes()
    shares = {}
    for module, splits in _of_modules(made.records).items():
        ids = np.unique(np.concatenate([ids for ids, _ in splits]))
        ids = ids[ids >= 0]
        shares[module] = float((reasons[ids] < 0).mean()) if len(ids) else 1.0
    return shares
