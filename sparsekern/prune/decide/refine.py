"""Uses up the rest of a budget where single steps are large, such as a width that all layers share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sparsekern.prune.decide.problem import Blocks, Problem

# Maximal number of large steps that are exchanged for smaller ones, one after the other.
EXCHANGES = 8


def give_back(problem: Problem, blocks: Blocks, stays: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Restore the removed blocks that fit into the rest of the budget.

    Args:
        problem: the problem.
        blocks: its blocks.
        stays: bool ``[blocks]``; the blocks that stay so far.
        order: int64 ``[n]``; the blocks to restore, the most important one first. Among blocks of one role
            the more salient ones come first.

    Returns:
        bool ``[blocks]``; the blocks that stay. No other block of ``order`` fits behind those of its role.
    """
    size = problem.graph.num_channels
    waiting, stays = order[~stays[order]], stays.copy()

    def fits(count: int) -> bool:
        changed = stays.copy()
        changed[waiting[:count]] = True
        return problem.cost(blocks.kept(changed, size)) <= problem.budget

    if not fits(0):
        return stays
    while len(waiting):
        count = _largest(fits, len(waiting))
        stays[waiting[:count]] = True
        refused, waiting = blocks.role[waiting[count : count + 1]], waiting[count:]
        # A later block of the same role has to wait for the one that does not fit.
        waiting = waiting[~np.isin(blocks.role[waiting], refused)]
    return stays


def _largest(fits: Callable[[int], bool], count: int) -> int:
    """The largest number up to ``count`` for which ``fits`` is true, if it is true up to it and for 0."""
    low, step = 0, 1
    # Most often nothing fits, so small numbers come first.
    while low + step <= count and fits(low + step):
        low, step = low + step, 2 * step
    high = min(low + step, count + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def exchange(
    problem: Problem,
    blocks: Blocks,
    stays: np.ndarray,
    remove: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """Restore large steps whose place smaller ones can take, as long as more saliency stays.

    Args:
        problem: the problem.
        blocks: its blocks.
        stays: bool ``[blocks]``; a choice within the budget, or above it where floors do not allow more.
        remove: maps blocks that stay and blocks that have to, both bool ``[blocks]``, to a choice without
            blocks that are less important.

    Returns:
        bool ``[blocks]``; the blocks that stay.
    """
    size, saliency = problem.graph.num_channels, blocks.sums(problem.saliency)
    if problem.cost(blocks.kept(stays, size)) > problem.budget:
        return stays
    coarse = problem.coarse
    for _ in range(EXCHANGES):
        best = stays
        # The first removed block of each role; the blocks of a role that stay come first.
        _, first = np.unique(np.where(stays, -1, blocks.role), return_index=True)
        for block in first[~stays[first]]:
            if not coarse[blocks.role[block]]:
                continue
            held = (blocks.role == blocks.role[block]) & (np.arange(len(stays)) <= block)
            changed = remove(stays | held, held)
            fits = problem.cost(blocks.kept(changed, size)) <= problem.budget
            if fits and saliency[changed].sum() > saliency[best].sum():
                best = changed
        if best is stays:
            break
        stays = best
    return stays
