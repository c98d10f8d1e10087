"""Swaps blocks of channels between roles after a greedy choice, to use up the budget."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sparsekern.prune.decide.problem import Blocks, Problem

# Maximal number of changes, and of candidates per change whose cost is computed.
CHANGES = 48
TRIES = 192


def swap_blocks(problem: Problem, blocks: Blocks, stays: np.ndarray) -> np.ndarray:
    """Improve ``stays`` (bool ``[blocks]``) by single changes that add saliency within the budget.

    A change restores the next block of one role. It may remove the last block of another role, if that block
    is less salient and lies above the floor.

    Returns:
        bool ``[blocks]``; the blocks that stay.
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
    """The changes whose estimated cost fits the budget, by falling gain of saliency."""
    kept = blocks.kept(stays, problem.graph.num_channels)
    saliency, length = blocks.sums(problem.saliency), np.bincount(blocks.block)
    role = blocks.role
    starts = np.flatnonzero(np.diff(role, prepend=-1))
    ends = np.append(starts[1:], len(role))
    # The staying blocks of a role come first.
    following = starts + np.add.reduceat(stays.astype(np.int64), starts)
    price = blocks.sums(problem.price(kept)) / length
    back, last = following[following < ends], following[following > starts] - 1
    last = last[blocks.removable[last]]
    # A restored block costs about as much as the removal of the block before it saves.
    costs = price[np.maximum(back - 1, 0)] * length[back]
    saved, lost = np.append(price[last] * length[last], 0.0), np.append(saliency[last], 0.0)
    gain = saliency[back][:, None] - lost
    room = problem.budget - problem.cost(kept)
    fits = (costs[:, None] - saved <= room) & (gain > 0)
    fits[:, :-1] &= role[back][:, None] != role[last]
    for index in np.argsort(np.where(fits, -gain, np.inf), axis=None, kind="stable")[
        : min(TRIES, fits.sum())
    ]:
        add, remove = np.unravel_index(index, gain.shape)
        changed = stays.copy()
        changed[back[add]] = True
        if remove < len(last):
            changed[last[remove]] = False
        yield changed
