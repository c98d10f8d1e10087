"""Checking what the trace can only guess: sizes that a program may have written out.

``view(n, 4, c // 4, h, w)`` and ``view(n, c // 4, 4, h, w)`` leave the same trace where c is 16.
The rules read such a split as a fixed number of equal groups. Here the traced copy is shrunk under
that reading and traced again: a guess that does not come out in the predicted shapes is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import fx

from .capture import Capture, Captured
from .interpret import Tracked, shapes
from .numbering import Numbering
from .records import Records
from .shrink import shrunk
from .trial import Fault
from .values import Value


def wrong_guesses(
    captured: Capture, tensors: Sequence[Tracked], numbering: Numbering, records: Records
) -> list[Fault]:
    """The guesses of prunable slots that a smaller copy does not bear out."""
    guesses = {key: ids for key, ids in records.guesses.items() if (numbering.channel_of[ids] >= 0).any()}
    if not guesses:
        return []
    gone = _half(numbering, np.concatenate(list(guesses.values())))
    wrong: list[Fault] = []
    with shrunk(captured.source, tensors, gone):
        for graph in captured.graphs:
            mode = not graph.training
            of_mode = {node: ids for (m, node), ids in guesses.items() if m == mode}
            if not of_mode:
                continue
            try:
                small = captured.source.export(graph.training)
            except ValueError as error:
                reason = f"a smaller copy cannot be traced: {str(error).rpartition('it raised ')[2]}"
                return [Fault(ids, reason) for ids in guesses.values()]
            wrong += _compare(graph, small, of_mode, records, gone)
    return wrong


def _half(numbering: Numbering, guessed: np.ndarray) -> np.ndarray:
    """Which slots go (bool): every second channel of the groups that the guesses touch."""
    touched = numbering.channel_of[guessed]
    gone = np.zeros(len(numbering.group_of), bool)
    for group in np.unique(numbering.group_of[touched[touched >= 0]]):
        gone[np.flatnonzero(numbering.group_of == group)[1::2]] = True
    return numbering.slots_of(gone)


def _compare(
    before: Captured,
    small: Captured,
    guesses: dict[str, np.ndarray],
    records: Records,
    gone: np.ndarray,
) -> list[Fault]:
    pairs = list(zip(_steps(before), _steps(small), strict=False))
    alike = len(_steps(before)) == len(_steps(small)) and all(
        (a.name, a.target) == (b.name, b.target) for a, b in pairs
    )
    if not alike:
        return [Fault(ids, "a smaller copy runs other ops") for ids in guesses.values()]
    differ = set()
    for old, new in pairs:
        values = records.values.get((not before.training, old.name))
        if values is None:
            continue
        made = values if isinstance(values, tuple) else (values,)
        if [_predicted(v, gone) for v in made] != [shape for shape, _ in shapes(new)]:
            differ.add(old.name)
    found = differ.intersection(guesses) or (set(guesses) if differ else set())
    reason = "it is split into parts of a fixed size"
    return [Fault(guesses[node], reason) for node in guesses if node in found]


def _steps(graph: Captured) -> list[fx.Node]:
    return [node for node in graph.module.graph.nodes if node.op == "call_function"]


def _predicted(value: Value, gone: np.ndarray) -> tuple[int, ...]:
    return tuple(
        size if ids is None else int(((ids < 0) | ~gone[ids]).sum())
        for size, ids in zip(value.shape, value.ids, strict=True)
    )
