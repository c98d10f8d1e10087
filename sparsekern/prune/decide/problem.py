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
            object.__setattr__(self, "whole", self.cost(self.graph.all_channels()))
        if not len(self.widths):
            object.__setattr__(self, "widths", np.array([len(g.channels) for g in self.graph.groups]))

    @cached_property
    def block_sizes(self) -> np.ndarray:
        """Channels in a block, int64 ``[groups]``.

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

    Attributes:
        channel: int64 ``[n]``; live channels, group by group, most salient first.
        group: int64 ``[n]``; group of each channel.
        rank: int64 ``[n]``; position of each channel within its group.
        block: int64 ``[n]``; block of each channel. Numbers go on from group to group, most salient first.
        removable: bool ``[blocks]``; whether the block lies above the floor of its group.
    """

    channel: np.ndarray
    group: np.ndarray
    rank: np.ndarray
    block: np.ndarray
    removable: np.ndarray

    @classmethod
    def cut(cls, problem: Problem) -> Blocks:
        """Rank the live channels of each group by saliency and cut them into blocks."""
        group_of = problem.graph.group_of
        live = np.flatnonzero(problem.live)
        # Ties are broken by id: of equally salient channels the first one stays.
        channel = live[np.lexsort((live, -problem.saliency[live], group_of[live]))]
        group = group_of[channel]
        first = np.searchsorted(group, group, side="left")
        rank = np.arange(len(channel)) - first
        starts = rank % problem.block_sizes[group] == 0
        block = np.cumsum(starts) - 1
        # A block that begins below the floor contains channels that have to stay.
        removable = rank[starts] >= problem.floors[group[starts]]
        return cls(channel, group, rank, block, removable)

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
