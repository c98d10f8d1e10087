"""A search for the interpretation of ambiguous splits that leaves the most to prune.

``reshape(b, n, 3, heads, size)`` of one dimension may mean heads that are removed whole, or positions
inside a head that all heads share. Another op may freeze the slots that the first choice ties together
(attention scales by the head's size). Then other choices are tried: the same axis, counted from the end,
for all splits of a module; then, if these splits differ in form, all combinations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product, zip_longest
from typing import NamedTuple

import numpy as np

from sparsekern.graph.propagate.interpret import Tracked
from sparsekern.graph.propagate.records import Records, Split
from sparsekern.graph.propagate.slots import Slots

Choices = tuple[int, ...]

# Every attempt interprets the whole network.
_MOST_COMBINATIONS = 8


class Round(NamedTuple):
    """One run of the interpreter over all graphs, on newly allocated slots.

    Attributes:
        tensors: the registered tensors with their slots.
        slots: all slots.
        records: the records of the run.
    """

    tensors: Sequence[Tracked]
    slots: Slots
    records: Records


class _Score(NamedTuple):
    """The success of a module's choices; larger is better.

    Attributes:
        free: the fraction of free slots among those at the module's splits.
        reached: the step of the program that froze the first of the others. Of two choices that leave
            nothing, the one that gets further gives the better reason.
    """

    free: float
    reached: int


def best_interpretation(
    attempt: Callable[[Mapping[str, Choices]], Round], refuted: Mapping[str, Choices] | None = None
) -> tuple[Round, dict[str, Choices]]:
    """Find the interpretations that leave the most slots free.

    Args:
        attempt: runs the interpreter with the given choices by module: the number of a choice for every
            split in the order in which the module's forward makes them. The first one (0) is taken
            where none is given.
        refuted: choices that a smaller copy has shown to be wrong, by module. The search begins behind them.

    Returns:
        The best round, and its choices by module (none where they are the first ones).
    """
    best = attempt({})
    chosen: dict[str, Choices] = {}
    left = {module: _alternatives(splits) for module, splits in _of_modules(best.records).items()}
    for module, wrong in (refuted or {}).items():
        others = left.get(module, iter(()))
        if any(wrong):
            # The choices are looked for among the others up to the wrong ones, which are dropped.
            next((other for other in others if other == wrong), None)
        if (other := next(others, None)) is not None:
            chosen[module] = other
    if chosen:
        best = attempt(chosen)
    while True:
        scores = _scores(best)
        stuck = {m: next(left[m], None) for m, score in scores.items() if score.free < 1 and m in left}
        tries = {module: choices for module, choices in stuck.items() if choices is not None}
        if not tries:
            return best, chosen
        tried = attempt({**chosen, **tries})
        now, frees = _scores(tried), _count(tried) >= _count(best)
        better = {
            m: choices
            for m, choices in tries.items()
            if m in now and (now[m].free > scores[m].free or (frees and now[m] > scores[m]))
        }
        chosen |= better
        if better == tries:
            best = tried
        elif better:
            best = attempt(chosen)


def _of_modules(records: Records) -> dict[str, list[Split]]:
    """The splits of every module in the order of one pass of its graph."""
    found: dict[str, dict[int, Split]] = {}
    for split in records.splits:
        found.setdefault(split.module, {}).setdefault(split.number, split)
    return {module: [own[n] for n in sorted(own)] for module, own in found.items()}


def _alternatives(splits: Sequence[Split]) -> Iterator[Choices]:
    """Choices for the splits of a module other than the first ones, each once."""
    first = tuple(0 for _ in splits)
    seen = {tuple(split.axes[0] for split in splits)}
    alike = zip_longest(*(split.axes[1:] for split in splits), fillvalue=None)
    uniform = [
        tuple(
            0 if axis is None else 1 + split.axes[1:].index(axis)
            for axis, split in zip(a, splits, strict=True)
        )
        for a in alike
    ]
    several: list[Choices] = []
    if len({split.axes for split in splits}) > 1:
        several = list(product(*(range(len(set(split.axes))) for split in splits)))[:_MOST_COMBINATIONS]
    for choices in [*uniform, *several]:
        axes = tuple(split.axes[n] for n, split in zip(choices, splits, strict=True))
        if choices != first and axes not in seen:
            seen.add(axes)
            yield choices


def _scores(made: Round) -> dict[str, _Score]:
    """The score of every module that has splits."""
    _, reasons = made.slots.classes()
    steps = np.append(np.asarray(made.slots.steps, np.int64), np.iinfo(np.int64).max)
    scores = {}
    for module, splits in _of_modules(made.records).items():
        ids = np.unique(np.concatenate([split.ids for split in splits]))
        given = reasons[ids[ids >= 0]]
        free = float((given < 0).mean()) if len(given) else 1.0
        scores[module] = _Score(free, int(steps[given].min()) if len(given) else 0)
    return scores


def _count(made: Round) -> int:
    """The number of free slots."""
    _, reasons = made.slots.classes()
    return int((reasons < 0).sum())
