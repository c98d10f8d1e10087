"""Allocators choose the width of each group: they map saliencies and a budget to the channels to keep.

All allocators work in *blocks*. The channels of a group are ranked by saliency and cut, from the most
salient down, into blocks of ``round_to`` rows. Only whole blocks are removed, the last one of the group
first. So the width of a layer is a multiple of ``round_to`` or stays unchanged, and a floor is a number of
blocks that stay. Groups that keep the same width (``equal="role"``) have common blocks, of the same ranks in
each.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sparsekern.prune.decide.problem import Blocks, Pricing, Problem
from sparsekern.prune.decide.refine import exchange, give_back
from sparsekern.prune.decide.swap import swap_blocks

__all__ = [
    "Allocator",
    "Flat",
    "Global",
    "Pricing",
    "Problem",
    "Uniform",
]


def __dir__() -> list[str]:
    return __all__


class Allocator(ABC):
    """Decides the widths of all groups under a budget."""

    @abstractmethod
    def __call__(self, problem: Problem) -> np.ndarray:
        """The channels to keep, bool ``[C]``, a subset of ``problem.live`` whose cost is within the budget.

        If floors and rounding do not allow this, the result is the smallest set that they allow.
        """


def smallest(problem: Problem) -> np.ndarray:
    """bool ``[C]``; channels that no allocator may remove, because their blocks lie within the floors."""
    blocks = Blocks.cut(problem)
    return blocks.kept(~blocks.removable, problem.graph.num_channels)


@dataclass(frozen=True)
class Global(Allocator):
    """Ranks the blocks of all groups together by saliency per saved cost, and removes the lowest first.

    Costs change as neighbouring groups shrink, so they are computed again after each portion.

    Attributes:
        portion: share of the remaining excess cost that is removed before costs are computed again, in (0,
            1].
        balance: smallest width of a group as a share of its width under an even cut, in [0, 1]. It yields if
            the budget cannot be met otherwise. A first-order estimate rates each channel alone and misses
            that the last few channels of a group carry all of its information.

    Raises:
        ValueError: an attribute is out of range.
    """

    portion: float = 0.1
    balance: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.portion <= 1:
            raise ValueError(f"portion: got {self.portion!r}, expected a share in (0, 1]")
        if not 0 <= self.balance <= 1:
            raise ValueError(f"balance: got {self.balance!r}, expected a share in [0, 1]")

    def __call__(self, problem: Problem) -> np.ndarray:
        blocks = Blocks.cut(problem)
        stays, above = np.ones(len(blocks.removable), bool), self._above_balance(problem, blocks)
        order = np.zeros(0, np.int64)
        for removable in (blocks.removable & above, blocks.removable):
            stays, removed = self._remove(problem, blocks, stays, removable)
            order = np.append(order, removed)
        if problem.coarse.any():
            stays = self._refine(problem, blocks, stays, order, blocks.removable & above)
        if problem.pricing is not None:
            # Latency changes in steps, so a swap of blocks can still use a rest of the budget.
            stays = swap_blocks(problem, blocks, stays)
        return blocks.kept(stays, problem.graph.num_channels)

    def _refine(
        self, problem: Problem, blocks: Blocks, stays: np.ndarray, order: np.ndarray, removable: np.ndarray
    ) -> np.ndarray:
        """Use up the rest of the budget that the last large steps have left.

        Args:
            problem: the problem.
            blocks: its blocks.
            stays: bool ``[blocks]``; the blocks that stay so far.
            order: int64 ``[n]``; the removed blocks, the first removed one first.
            removable: bool ``[blocks]``; those that may go in place of a large step.
        """

        def remove(stays: np.ndarray, held: np.ndarray) -> np.ndarray:
            stays, removed = self._remove(problem, blocks, stays, removable & ~held)
            return give_back(problem, blocks, stays, np.append(order, removed)[::-1])

        stays = give_back(problem, blocks, stays, order[::-1])
        return exchange(problem, blocks, stays, remove)

    def _above_balance(self, problem: Problem, blocks: Blocks) -> np.ndarray:
        """bool ``[blocks]``; blocks beyond the width that ``balance`` reserves for their group."""
        if problem.pricing is None:
            # Both dimensions of a weight shrink together, so the cost is about quadratic in the widths.
            even = np.sqrt(min(1.0, problem.budget / problem.whole))
        else:
            even = Uniform()(problem).sum() / problem.widths.sum()
        first = blocks.first
        return blocks.rank[first] >= self.balance * even * problem.widths[blocks.group[first]]

    def _remove(
        self, problem: Problem, blocks: Blocks, stays: np.ndarray, removable: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Remove blocks of ``stays`` until the budget is met or no removable block is left.

        Returns:
            The blocks that are left, bool ``[blocks]``, and the removed ones in that order, int64 ``[n]``.
        """
        stays, removed = stays.copy(), [np.zeros(0, np.int64)]
        saliency = blocks.sums(problem.saliency)
        size = problem.graph.num_channels
        kept = blocks.kept(stays, size)
        excess = problem.cost(kept) - problem.budget
        while excess > 0 and (candidates := np.flatnonzero(stays & removable)).size:
            price = np.maximum(blocks.sums(problem.price(kept)), 1e-9)
            order = self._removal_order(blocks, candidates, saliency / price)
            saved = np.cumsum(price[order])
            take = max(1, int(np.searchsorted(saved, excess * self.portion, side="right")))
            stays[order[:take]] = False
            removed.append(order[:take])
            kept = blocks.kept(stays, size)
            excess = problem.cost(kept) - problem.budget
        return stays, np.concatenate(removed)

    @staticmethod
    def _removal_order(blocks: Blocks, candidates: np.ndarray, ratio: np.ndarray) -> np.ndarray:
        """Candidates by rising ratio; within a role, less salient blocks always come first."""
        # The blocks of a role are sorted, most salient first. A running maximum from the last block keeps
        # that.
        monotone = ratio[candidates].copy()
        for start, stop in _runs(blocks.role[candidates]):
            monotone[start:stop] = np.maximum.accumulate(monotone[start:stop][::-1])[::-1]
        return candidates[np.lexsort((-candidates, monotone))]


WITHOUT_DATA = Global(balance=0.75)
"""Default for saliencies without gradients.

A norm of weights is not in units of the loss. Divided by the cost of a channel, it cuts the first layers,
whose channels cost most, down to the reserved width and no other layer; so do norms relative to their group.
Therefore more width is reserved.
"""


@dataclass(frozen=True)
class Uniform(Allocator):
    """Keeps the same share of every group, as a control for widths."""

    def __call__(self, problem: Problem) -> np.ndarray:
        return _bisect(problem, lambda share: share * problem.widths)


@dataclass(frozen=True)
class Flat(Allocator):
    """Keeps at most the same number of channels in every group, as another control for widths."""

    def __call__(self, problem: Problem) -> np.ndarray:
        widest = problem.widths.max(initial=0)
        return _bisect(problem, lambda share: np.full(len(problem.widths), share * widest))


def _bisect(problem: Problem, widths: Callable[[float], np.ndarray]) -> np.ndarray:
    """Keep the blocks that lie mostly within ``widths(share)``, for the largest share within the budget.

    Where blocks are large steps, those that follow and still fit into the budget stay as well.
    """
    blocks, whole = Blocks.cut(problem), 1.0 + int(problem.multiples.max(initial=1))
    begins, group = blocks.rank[blocks.first], blocks.group[blocks.first]
    members = np.bincount(problem.roles)[blocks.role]
    own = np.isin(blocks.role, list(problem.steps))
    lengths = np.where(own, np.bincount(blocks.block) / members, problem.multiples[group])
    middles, size = begins + lengths / 2, problem.graph.num_channels

    def stays(share: float) -> np.ndarray:
        # A block stays if at least half of it lies within the width.
        within: np.ndarray = middles <= widths(share)[group]
        return within | ~blocks.removable

    def fits(share: float) -> bool:
        return problem.cost(blocks.kept(stays(share), size)) <= problem.budget

    low, high = (whole, whole) if fits(whole) else (0.0, whole)
    # The precision is 2^-20 of a group's width: less than one channel for groups below a million.
    for _ in range(20 + int(whole).bit_length() if low < high else 0):
        middle = (low + high) / 2
        if fits(middle):
            low = middle
        else:
            high = middle
    chosen = stays(low)
    if problem.coarse.any():
        chosen = give_back(problem, blocks, chosen, np.argsort(middles / widths(1.0)[group], kind="stable"))
    return blocks.kept(chosen, size)


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
    """Start and stop of each run of equal neighbours."""
    edges = np.flatnonzero(np.diff(values)) + 1
    bounds = [0, *edges.tolist(), len(values)]
    return list(itertools.pairwise(bounds))
