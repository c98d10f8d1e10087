"""How wide each group stays: allocators turn saliencies and a budget into the channels to keep.

All of them work in *blocks*: within a group, channels are ranked by saliency and cut, from the most salient
down, into blocks of ``round_to``; a block goes whole, the last one of its group first. So a group's width is
a multiple of ``round_to`` or what it was, and a floor is a number of blocks that never go.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sparsekern.prune.decide.exchange import exchange
from sparsekern.prune.decide.problem import Blocks, Pricing, Problem

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

        Where floors and rounding do not allow that, the smallest set that they do allow.
        """


def smallest(problem: Problem) -> np.ndarray:
    """The channels that no allocator may remove: those of the blocks at the floors."""
    blocks = Blocks.cut(problem)
    return blocks.kept(~blocks.removable, problem.graph.num_channels)


@dataclass(frozen=True)
class Global(Allocator):
    """Saliency per cost over all groups at once: the cheapest loss goes first.

    Blocks are removed in order of saliency over the cost that their removal saves. Costs change as neighbours
    shrink, so they are taken anew after each portion.

    Attributes:
        portion: share of the remaining excess cost that is removed between two looks at the costs, in (0, 1].
        balance: no group becomes narrower than ``balance`` times what an even cut would leave of it, unless
            the budget cannot be met otherwise, in [0, 1]. An estimate of first order sees a group's channels
            one by one and not that the last few of them carry it all.

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
        stays = np.ones(len(blocks.removable), bool)
        for removable in (blocks.removable & self._above_balance(problem, blocks), blocks.removable):
            stays = self._remove(problem, blocks, stays, removable)
        if problem.pricing is not None:
            # Times go in steps, and what a step leaves of the budget is worth having.
            stays = exchange(problem, blocks, stays)
        return blocks.kept(stays, problem.graph.num_channels)

    def _above_balance(self, problem: Problem, blocks: Blocks) -> np.ndarray:
        """bool ``[blocks]``; blocks that lie outside of the width that balance reserves for their group."""
        if problem.pricing is None:
            # Both dimensions of a weight shrink together, so a cost goes with the square of the widths.
            even = np.sqrt(min(1.0, problem.budget / problem.whole))
        else:
            even = Uniform()(problem).sum() / problem.widths.sum()
        first = blocks.first
        return blocks.rank[first] >= self.balance * even * problem.widths[blocks.group[first]]

    def _remove(
        self, problem: Problem, blocks: Blocks, stays: np.ndarray, removable: np.ndarray
    ) -> np.ndarray:
        """The blocks among ``stays`` that are left when the budget is met, or nothing removable is."""
        stays = stays.copy()
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
            kept = blocks.kept(stays, size)
            excess = problem.cost(kept) - problem.budget
        return stays

    @staticmethod
    def _removal_order(blocks: Blocks, candidates: np.ndarray, ratio: np.ndarray) -> np.ndarray:
        """Candidates by ratio, but never a block before the less salient ones of its group."""
        group_of_block = blocks.group[blocks.first[candidates]]
        # Within a group blocks lie most salient first: a running maximum from the last up keeps that order.
        monotone = ratio[candidates].copy()
        for start, stop in _runs(group_of_block):
            monotone[start:stop] = np.maximum.accumulate(monotone[start:stop][::-1])[::-1]
        return candidates[np.lexsort((-candidates, monotone))]


WITHOUT_DATA = Global(balance=0.75)
"""For saliencies that no gradient has entered: a norm of weights is not in units of the loss.

Divided by what a channel costs it leaves the first layers, whose channels cost most, at the reserved width
and cuts nothing else; norms that are taken relative to their group do the same. So more width is reserved.
"""


@dataclass(frozen=True)
class Uniform(Allocator):
    """The same share of every group stays: the control for widths."""

    def __call__(self, problem: Problem) -> np.ndarray:
        return _bisect(problem, lambda share: share * problem.widths)


@dataclass(frozen=True)
class Flat(Allocator):
    """Every group keeps at most the same number of channels: the other control for widths."""

    def __call__(self, problem: Problem) -> np.ndarray:
        widest = problem.widths.max(initial=0)
        return _bisect(problem, lambda share: np.full(len(problem.widths), share * widest))


def _bisect(problem: Problem, widths: Callable[[float], np.ndarray]) -> np.ndarray:
    """Keep the blocks that begin below ``widths(share)``, with the largest share that meets the budget."""
    blocks = Blocks.cut(problem)
    begins, group = blocks.rank[blocks.first], blocks.group[blocks.first]

    def keep(share: float) -> np.ndarray:
        # A block stays when most of it lies within the width.
        within = begins + problem.round_to / 2 <= widths(share)[group]
        return blocks.kept(within | ~blocks.removable, problem.graph.num_channels)

    if problem.cost(keep(1.0 + problem.round_to)) <= problem.budget:
        return keep(1.0 + problem.round_to)
    low, high = 0.0, 1.0 + problem.round_to
    # 2^-20 of a group's width: below one channel for every group of less than a million.
    for _ in range(20 + problem.round_to.bit_length()):
        middle = (low + high) / 2
        if problem.cost(keep(middle)) <= problem.budget:
            low = middle
        else:
            high = middle
    return keep(low)


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
    """Start and stop of each run of equal neighbours."""
    edges = np.flatnonzero(np.diff(values)) + 1
    bounds = [0, *edges.tolist(), len(values)]
    return list(itertools.pairwise(bounds))
