"""How wide each group stays: allocators turn saliencies and a budget into the channels to keep.

All of them work in *blocks*: within a group, channels are ranked by saliency and cut, from the most salient
down, into blocks of ``round_to``; a block goes whole, the last one of its group first. So a group's width is
a multiple of ``round_to`` or what it was, and a floor is a number of blocks that never go.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from sparsekern.graph import ChannelGraph
from sparsekern.prune.decide.exchange import exchange

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


class Pricing(Protocol):
    """A cost of kept channels that is not one of the graph's own, in a unit of its own."""

    def cost(self, kept: np.ndarray) -> float:
        """Cost of the network with the channels ``kept``, bool ``[C]``."""

    def price(self, kept: np.ndarray) -> np.ndarray:
        """What a channel's removal saves, float64 ``[C]``; 0 for those not kept."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What an allocator decides about.

    Attributes:
        graph: groups and their cost.
        saliency: float64 ``[C]``.
        live: bool ``[C]``; channels that may still be kept.
        budget: the cost to come down to, in units of ``of``.
        of: the cost: ``"macs"``, ``"params"`` or what ``pricing`` gives.
        floors: int64 ``[groups]``; channels that stay at least.
        round_to: block size.
        whole: cost of the network that nothing was removed from, by default that of ``graph``.
        widths: int64 ``[groups]``; channels that the groups had there, by default those of ``graph``.
        pricing: costs that are not the graph's own.
    """

    graph: ChannelGraph
    saliency: np.ndarray
    live: np.ndarray
    budget: float
    of: str
    floors: np.ndarray
    round_to: int = 1
    whole: float = 0
    widths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    pricing: Pricing | None = None

    def __post_init__(self) -> None:
        if not self.whole:
            object.__setattr__(self, "whole", self.cost(np.ones(self.graph.num_channels, bool)))
        if not len(self.widths):
            object.__setattr__(self, "widths", np.array([len(g.channels) for g in self.graph.groups]))

    def cost(self, kept: np.ndarray) -> float:
        """Cost of the network with the channels ``kept``, in units of ``of``."""
        return getattr(self.graph.cost(kept), self.of) if self.pricing is None else self.pricing.cost(kept)

    def price(self, kept: np.ndarray) -> np.ndarray:
        """What the removal of each channel saves, float64 ``[C]``; 0 for those not ``kept``."""
        return self.graph.price(kept, self.of) if self.pricing is None else self.pricing.price(kept)


class Allocator(ABC):
    """Decides the widths of all groups under a budget."""

    @abstractmethod
    def __call__(self, problem: Problem) -> np.ndarray:
        """The channels to keep, bool ``[C]``, a subset of ``problem.live`` whose cost is within the budget.

        Where floors and rounding do not allow that, the smallest set that they do allow.
        """


@dataclass(frozen=True, eq=False)
class Blocks:
    """The live channels of a problem, cut into blocks.

    Attributes:
        channel: int64 ``[n]``; live channels, group by group, most salient first.
        group: int64 ``[n]``; group of each.
        block: int64 ``[n]``; block of each, numbered through, the most salient of a group first.
        removable: bool ``[blocks]``; above the floor of its group.
        rank: int64 ``[n]``; position within the group.
    """

    channel: np.ndarray
    group: np.ndarray
    rank: np.ndarray
    block: np.ndarray
    removable: np.ndarray

    @classmethod
    def cut(cls, problem: Problem) -> Blocks:
        group_of = problem.graph.group_of
        live = np.flatnonzero(problem.live)
        # Ties go by id: of equally salient channels the first one stays.
        channel = live[np.lexsort((live, -problem.saliency[live], group_of[live]))]
        group = group_of[channel]
        first = np.searchsorted(group, group, side="left")
        rank = np.arange(len(channel)) - first
        starts = rank % problem.round_to == 0
        block = np.cumsum(starts) - 1
        # A block that begins below the floor holds channels that have to stay.
        removable = rank[starts] >= problem.floors[group[starts]]
        return cls(channel, group, rank, block, removable)

    @property
    def first(self) -> np.ndarray:
        """Position of each block's first channel, int64 ``[blocks]``."""
        return np.searchsorted(self.block, np.arange(len(self.removable)))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum over each block of a quantity given for all channels ``[C]``."""
        return np.bincount(self.block, weights=values[self.channel], minlength=len(self.removable))

    def kept(self, stays: np.ndarray, size: int) -> np.ndarray:
        """bool ``[size]`` of the channels in the blocks that stay."""
        kept = np.zeros(size, bool)
        kept[self.channel[stays[self.block]]] = True
        return kept


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
