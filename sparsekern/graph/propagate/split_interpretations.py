"""A search for the interpretation of ambiguous splits that leaves the most to prune.

``reshape(b, n, 3, heads, size)`` of one dimension may mean heads that are removed whole, or positions
inside a head that all heads share. The rules take one interpretation for all splits of a module. If
another op freezes the slots that it ties together (attention scales by the head's size), the next
interpretation is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sparsekern.graph.propagate.interpret import Tracked
from sparsekern.graph.propagate.records import Records
from sparsekern.graph.propagate.slots import Slots


class Round(NamedTuple):
    """One run of the interpreter over all graphs, on newly allocated slots.

    Attributes:
        tensors: The registered tensors with their slots.
        slots: All slots.
        records: The records of the run.
    """

    tensors: Sequence[Tracked]
    slots: Slots
    records: Records


def best_interpretation(attempt: Callable[[Mapping[str, int]], Round]) -> Round:
    """Find the interpretations that leave the most slots free.

    Args:
        attempt: Runs the interpreter with the given interpretations, by module. The first one (0) is
            taken for a module that is absent.

    Returns:
        The best round.
    """
    best = attempt({})
    chosen: dict[str, int] = {}
    slots = _of_modules(best.records)
    interpretations = {module: max(n for _, n in splits) for module, splits in slots.items()}
    for interpretation in range(1, max(interpretations.values(), default=0)):
        free = _free(best)
        stuck = [m for m, n in interpretations.items() if n > interpretation and free[m] < 1]
        if not stuck:
            break
        tried = attempt({**chosen, **dict.fromkeys(stuck, interpretation)})
        now = _free(tried)
        better = [m for m in stuck if now.get(m, 0.0) > free[m]]
        chosen |= dict.fromkeys(better, interpretation)
        if better == stuck:
            best = tried
        elif better:
            best = attempt(chosen)
    return best


def _of_modules(records: Records) -> dict[str, list[tuple[np.ndarray, int]]]:
    found: dict[str, list[tuple[np.ndarray, int]]] = {}
    for module, ids, interpretations in records.splits:
        found.setdefault(module, []).append((ids, interpretations))
    return found


def _free(made: Round) -> dict[str, float]:
    """The fraction of free slots among the slots at a module's splits, by module."""
    _, reasons = made.slots.classes()
    shares = {}
    for module, splits in _of_modules(made.records).items():
        ids = np.unique(np.concatenate([ids for ids, _ in splits]))
        ids = ids[ids >= 0]
        shares[module] = float((reasons[ids] < 0).mean()) if len(ids) else 1.0
    return shares
