"""Exchanging blocks of channels under a budget, after a greedy choice has met it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sparsekern.prune.decide.problem import Blocks, Problem

# Changes at most, and candidates for each of which the cost is computed.
CHANGES = 48
TRIES = 192


def exchange(problem: Problem, blocks: Blocks, stays: np.ndarray) -> np.ndarray:
    """``stays`` (bool ``[blocks]``) with more saliency within the budget, where a single change gives that.

    A change brings back the next block of one group, alone or for the last one of a less salient group.
    Widths below those of ``stays`` are reached only down to the floors.
    """
    size = problem.graph.num_channels
    if problem.cost(blocks.kept(stays, size)) > problem.budget:
        return stays
    for _ in range(CHANGES):
        better = next(
            (
                changed
                for changed in _candidates(problem, blocks, stays)
                if problem.cost(blocks.kept(changed, size)) <= problem.budget
            ),
            None,
        )
        if better is None:
            break
        stays = better
    return stays


def _candidates(problem: Problem, blocks: Blocks, stays: np.ndarray) -> Iterator[np.ndarray]:
    """The changes that gain most saliency, of those whose prices promise to fit."""
    kept = blocks.kept(stays, problem.graph.num_channels)
    saliency, length = blocks.sums(problem.saliency), np.bincount(blocks.block)
    group = blocks.group[blocks.first]
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    ends = np.append(starts[1:], len(group))
    # The blocks of a group that stay are its first ones.
    following = starts + np.add.reduceat(stays.astype(np.int64), starts)
    price = blocks.sums(problem.price(kept)) / length
    back, last = following[following < ends], following[following > starts] - 1
    last = last[blocks.removable[last]]
    # A block that comes back costs about what its neighbour below would save.
    costs = price[np.maximum(back - 1, 0)] * length[back]
    saved, lost = np.append(price[last] * length[last], 0.0), np.append(saliency[last], 0.0)
    gain = saliency[back][:, None] - lost
    room = problem.budget - problem.cost(kept)
    fits = (costs[:, None] - saved <= room) & (gain > 0)
    fits[:, :-1] &= group[back][:, None] != group[last]
    for index in np.argsort(np.where(fits, -gain, np.inf), axis=None, kind="stable")[
        : min(TRIES, fits.sum())
    ]:
        add, remove = np.unravel_index(index, gain.shape)
        changed = stays.copy()
        changed[back[add]] = True
        if remove < len(last):
            changed[last[remove]] = False
        yield changed
