"""The problem that an allocator solves: channels with saliencies, a budget, and blocks of channels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from sparsekern.graph import ChannelGraph, Group


class Pricing(Protocol):
    """A cost of kept channels that the graph does not know, in any unit, such as a latency."""

    def cost(self, kept: np.ndarray) -> float:
        """Cost of the network with the channels ``kept``, bool ``[C]``."""

    def price(self, kept: np.ndarray) -> np.ndarray:
        """The saving by each channel's removal, float64 ``[C]``; 0 for channels not kept."""


@dataclass(frozen=True, eq=False)
class Problem:
    """The input of an allocator.

    Attributes:
        graph: groups and their cost.
        saliency: float64 ``[C]``; at least 0, larger is more important.
        live: bool ``[C]``; channels that may still be kept.
        budget: the cost to reach, in units of ``of``.
        of: the cost: ``"macs"``, ``"params"``, or the name of the cost that ``pricing`` gives.
        floors: int64 ``[groups]``; channels that every group keeps at least.
        round_to: rows and columns of layers that a block is a multiple of; see ``block_sizes``.
        whole: cost of the dense network, by default that of ``graph``.
        widths: int64 ``[groups]``; channels of the groups in the dense network, by default those of
            ``graph``.
        pricing: the cost if the graph does not know it, else None.
        roles: int64 ``[groups]``; groups with the same number keep the same width. By default each group has
            its own.
        divisors: int64 ``[groups]``; channels in a block of each group; 0, the default, for ``round_to``.
        steps: by role the only widths that its groups may have, int64 in rising order, for some roles.
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
    roles: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    divisors: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    steps: dict[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.whole:
            object.__setattr__(self, "whole", self.cost(self.graph.all_channels()))
        if not len(self.widths):
            object.__setattr__(self, "widths", np.array([len(g.channels) for g in self.graph.groups]))
        if not len(self.roles):
            object.__setattr__(self, "roles", np.arange(len(self.widths)))
        if not len(self.divisors):
            object.__setattr__(self, "divisors", np.zeros(len(self.widths), np.int64))

    @property
    def multiples(self) -> np.ndarray:
        """int64 ``[groups]``; channels in a block of each group."""
        return np.where(self.divisors > 0, self.divisors, self.block_sizes)

    @cached_property
    def coarse(self) -> np.ndarray:
        """Roles whose blocks are large steps of the cost, bool ``[roles]``.

        Such a block holds channels of several groups, reaches to the next width that a configuration accepts,
        or is a block of the network.
        """
        coarse = np.bincount(self.roles) > 1
        coarse[list(self.steps)] = True
        coarse[self.roles[[group.of_blocks for group in self.graph.groups]]] = True
        return coarse

    def edges(self, role: int) -> np.ndarray:
        """The widths at which blocks of a role in ``steps`` end, int64 in rising order."""
        steps, multiple = self.steps[role], self.multiples[self.roles == role][0]
        return steps[(steps % multiple == 0) | (steps == steps[-1])]

    def checked(self, kept: np.ndarray) -> np.ndarray:
        """Return the choice ``kept`` (bool ``[C]``) of an allocator.

        Raises:
            ValueError: groups of a role differ in their widths.
        """
        widths = np.bincount(self.graph.group_of[kept], minlength=len(self.roles))
        widest = np.zeros(len(self.roles), np.int64)
        np.maximum.at(widest, self.roles, widths)
        widest = widest[self.roles]
        # A group that went as a whole does not bind the others.
        for number in np.flatnonzero((widths != widest) & (widths > 0)):
            same = (self.roles == self.roles[number]) & (widths == widest)
            one, other = self.graph.groups[np.flatnonzero(same)[0]], self.graph.groups[number]
            raise ValueError(
                f"allocate: got {widths[one.id]} channels of {one.name} and {widths[number]} of "
                f"{other.name}, expected as many of both; its result has to follow problem.roles, or pass "
                f"equal=None"
            )
        return kept

    @cached_property
    def block_sizes(self) -> np.ndarray:
        """Channels in a block that follow from ``round_to``, int64 ``[groups]``.

        A channel may be several rows and columns of its layers, such as a head. Then fewer channels are a
        multiple of ``round_to``. A channel that stands for a block of the network is one of its own.
        """
        spans = [
            self.round_to if group.of_blocks else _span(self.graph, group) for group in self.graph.groups
        ]
        return np.array([self.round_to // math.gcd(self.round_to, span) for span in spans], np.int64)

    def cost(self, kept: np.ndarray) -> float:
        """Cost of the network with the channels ``kept`` (bool ``[C]``), in units of ``of``."""
        return getattr(self.graph.cost(kept), self.of) if self.pricing is None else self.pricing.cost(kept)

    def price(self, kept: np.ndarray) -> np.ndarray:
        """The saving by each channel's removal, float64 ``[C]``; 0 for channels not ``kept`` (bool "
        "``[C]``)."""
        return self.graph.price(kept, self.of) if self.pricing is None else self.pricing.price(kept)


def _span(graph: ChannelGraph, group: Group) -> int:
    """The largest number of which a channel's rows and columns are a multiple in all layers of the group."""
    span = 0
    for name, dim in group.members:
        channels = graph.tensors[name].channels[dim]
        if channels is not None and (name in group.producers or (name, dim) in group.consumers):
            counts = np.bincount(channels[channels >= 0], minlength=graph.num_channels)[group.channels]
            span = math.gcd(span, int(np.gcd.reduce(counts)))
    return max(span, 1)


@dataclass(frozen=True, eq=False)
class Blocks:
    """The live channels of a problem, cut into blocks.

    A block holds channels of the same ranks of all groups of a role, so that they go together.

    Attributes:
        channel: int64 ``[n]``; live channels, role by role and block by block, most salient first.
        group: int64 ``[n]``; group of each channel.
        rank: int64 ``[n]``; position of each channel within its group.
        block: int64 ``[n]``; block of each channel. Numbers go on from role to role, most salient first.
        role: int64 ``[blocks]``; role of each block.
        removable: bool ``[blocks]``; whether the block lies above the floors of its groups.
    """

    channel: np.ndarray
    group: np.ndarray
    rank: np.ndarray
    block: np.ndarray
    role: np.ndarray
    removable: np.ndarray

    @classmethod
    def cut(cls, problem: Problem) -> Blocks:
        """Rank the live channels of each group by saliency and cut them into blocks of ``multiples``.

        Groups of a role may have other numbers of live channels, because fading was undone. Channels beyond
        the smallest of these numbers are in no block, so no allocator keeps them.
        """
        group_of = problem.graph.group_of
        live = np.flatnonzero(problem.live)
        # Ties are broken by id: of equally salient channels the first one stays.
        channel = live[np.lexsort((live, -problem.saliency[live], group_of[live]))]
        group = group_of[channel]
        rank = np.arange(len(channel)) - np.searchsorted(group, group, side="left")
        within = rank < _common(problem)[group]
        channel, group, rank = channel[within], group[within], rank[within]
        ordinal, role = rank // problem.multiples[group], problem.roles[group]
        for number in problem.steps:
            ordinal[role == number] = np.searchsorted(problem.edges(number), rank[role == number], "right")
        order = np.lexsort((rank, group, ordinal, role))
        channel, group, rank, ordinal, role = (a[order] for a in (channel, group, rank, ordinal, role))
        starts = (np.diff(role, prepend=-1) != 0) | (np.diff(ordinal, prepend=-1) != 0)
        block = np.cumsum(starts) - 1
        # A block that begins below the floor contains channels that have to stay.
        floors = np.zeros(len(problem.roles), np.int64)
        np.maximum.at(floors, problem.roles, problem.floors)
        return cls(channel, group, rank, block, role[starts], rank[starts] >= floors[role[starts]])

    @property
    def first(self) -> np.ndarray:
        """Position of each block's first channel, int64 ``[blocks]``."""
        return np.searchsorted(self.block, np.arange(len(self.removable)))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum over each block of ``values`` ``[C]``, float64 ``[blocks]``."""
        return np.bincount(self.block, weights=values[self.channel], minlength=len(self.removable))

    def kept(self, stays: np.ndarray, size: int) -> np.ndarray:
        """bool ``[size]``; channels in the blocks ``stays`` (bool ``[blocks]``)."""
        kept = np.zeros(size, bool)
        kept[self.channel[stays[self.block]]] = True
        return kept


def _common(problem: Problem) -> np.ndarray:
    """The largest width that every group of a role can still have, int64 ``[groups]``.

    It is the smallest number of live channels in the role. In a role of several groups that have lost
    channels, it is a multiple of the size of a block, unless a floor is higher.
    """
    size, roles = len(problem.roles), problem.roles
    live = np.bincount(problem.graph.group_of[problem.live], minlength=size)
    least = np.full(size, np.iinfo(np.int64).max)
    # A group without any live channel went as a whole; it does not bind the others.
    some = live > 0
    np.minimum.at(least, roles[some], live[some])
    least = np.where(some, least[roles], 0)
    uneven = np.zeros(size, bool)
    np.logical_or.at(uneven, roles, live > least)
    whole = least - least % problem.multiples
    for number in problem.steps:
        mine, ends = roles == number, np.append(0, problem.edges(number))
        whole[mine] = ends[np.searchsorted(ends, least[mine], "right") - 1]
    whole = np.maximum(whole, np.minimum(least, problem.floors))
    return np.where(uneven[roles] & (whole > 0), whole, least)
