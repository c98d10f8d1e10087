"""The channels of a network as plain arrays, independent of any module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np

from sparsekern.graph.blocks import (
    Block,
    closed,
    emptied,
    kept_blocks,
    least_kept,
    renamed,
    renamed_group,
    restricted,
)
from sparsekern.graph.cost import MEASURES, Cost, CostModel
from sparsekern.graph.groups import ConstantRead, Gates, Group, Note, TensorSlots
from sparsekern.graph.numbers import KeptBlocks, after_removal
from sparsekern.graph.propagate.operations import Operation
from sparsekern.graph.table import describe

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """The channels of a network, their groups and their cost; see ``sparsekern.trace``.

    Attributes:
        groups: groups in the order of their first producers. The channel ids of a group are contiguous
            and follow the rows of its first producer.
        group_of: the group of every channel, int64 ``[C]``.
        tensors: every parameter and buffer that carries a channel, by name.
        gates: the rows that set the channels' scales.
        frozen: (parameter, reason) pairs: first the weights of which some or all rows stay, then all
            other parameters that no channel runs through.
        costs: the cost as a function of the kept channels.
        notes: for every tensor, why indices along its dimensions stay.
        operations: the ops of a pass in evaluation mode, in order. Their sizes are extents of ``costs``.
        untraced: why training mode was not traced; empty if it was.
        blocks: residual blocks that can be removed as a whole (``trace(..., depth=True)``). A channel stands
            for each of them; without it, the channels inside of the block go, too.
        constant_reads: layers whose output need not change when a channel that is constant is masked.
    """

    groups: tuple[Group, ...]
    group_of: np.ndarray
    tensors: dict[str, TensorSlots]
    gates: Gates
    frozen: tuple[tuple[str, str], ...]
    costs: CostModel
    notes: dict[str, tuple[Note, ...]]
    operations: tuple[Operation, ...]
    untraced: str = ""
    blocks: tuple[Block, ...] = ()
    constant_reads: tuple[ConstantRead, ...] = ()

    @property
    def num_channels(self) -> int:
        """The number of channels, C."""
        return len(self.group_of)

    def all_channels(self) -> np.ndarray:
        """Make the mask that keeps every channel, bool [C], all True."""
        return np.ones(self.num_channels, bool)

    def cost(self, kept: np.ndarray) -> Cost:
        """Compute the cost of the network with only some of its channels.

        Args:
            kept: which channels are kept, bool ``[C]``.

        Returns:
            Parameters, multiply-adds and bytes of activations.

        Raises:
            ValueError: ``kept`` has another shape or dtype.
        """
        return self.costs.cost(self._checked(kept))

    def price(self, kept: np.ndarray, of: str) -> np.ndarray:
        """Compute the saving of removing each kept channel alone.

        Args:
            kept: which channels are kept, bool ``[C]``.
            of: the measure: "params", "macs" or "activations" (bytes).

        Returns:
            The saving of each channel, float64 ``[C]``; 0 for channels that are not kept.

        Raises:
            ValueError: ``of`` is another measure, or ``kept`` has another shape or dtype.
        """
        if of not in MEASURES:
            raise ValueError(f"of: got {of!r}, expected one of {', '.join(MEASURES)}")
        return self.costs.price(self._checked(kept), of)

    def _checked(self, kept: np.ndarray) -> np.ndarray:
        kept = np.asarray(kept)
        if kept.dtype != bool or kept.shape != (self.num_channels,):
            raise ValueError(f"kept: got {kept.dtype}{list(kept.shape)}, expected bool[{self.num_channels}]")
        return kept

    def freeze(self, names: Iterable[str | int | Group], reason: str) -> ChannelGraph:
        """Make a graph without the named groups, whose channels then always stay.

        Args:
            names: names of groups, their ids, or the groups themselves.
            reason: the reason to give for the frozen channels.

        Returns:
            The graph of the other groups, with groups and channels renumbered.

        Raises:
            ValueError: this graph does not have such a group.
        """
        numbers = {self._number(name) for name in names}
        if not numbers:
            return self
        return self._frozen(np.isin(self.group_of, sorted(numbers)), reason)

    def with_blocks(self, blocks: Iterable[Block], reason: str) -> ChannelGraph:
        """Make the graph in which only these of its blocks can be removed.

        Args:
            blocks: some of ``self.blocks``.
            reason: the reason to give for the others.

        Returns:
            The graph, with groups and channels renumbered; ``self`` if it has no other blocks.
        """
        channels = {block.channel for block in blocks}
        others = [block for block in self.blocks if block.channel not in channels]
        gone = np.zeros(self.num_channels, bool)
        gone[[block.channel for block in others]] = True
        graph = self._frozen(gone, reason) if others else self
        return replace(graph, frozen=_merged(graph.frozen, (block.path for block in others), reason))

    def _frozen(self, gone: np.ndarray, reason: str) -> ChannelGraph:
        """The graph without the channels ``gone`` (bool ``[C]``): whole groups, or blocks."""
        renumbered = np.where(gone, -1, np.cumsum(~gone) - 1)
        left = [g for g in self.groups if not len(g.channels) or not gone[g.channels].all()]
        new = np.full(len(self.groups), -1, np.int64)
        new[[g.id for g in left]] = np.arange(len(left))
        blocks = tuple(
            replace(
                block,
                channel=int(renumbered[block.channel]),
                groups=tuple(int(new[g]) for g in block.groups if new[g] >= 0),
            )
            for block in self.blocks
            if not gone[block.channel]
        )
        writers = {name for block in blocks for name in block.writers}
        fixed = [p for g in self.groups if new[g.id] < 0 for p in g.producers]
        return ChannelGraph(
            groups=tuple(
                replace(g, id=number, channels=renumbered[g.channels[~gone[g.channels]]])
                for number, g in enumerate(left)
            ),
            group_of=new[self.group_of[~gone]],
            tensors=_renumbered(self.tensors, renumbered, writers),
            gates=_kept_gates(self.gates, gone),
            frozen=_merged(self.frozen, fixed, reason),
            costs=self.costs.fixed(gone),
            notes=_noted(self, gone, reason),
            operations=self.operations,
            untraced=self.untraced,
            blocks=blocks,
            constant_reads=self.constant_reads,
        )

    def restrict(self, kept: np.ndarray) -> ChannelGraph:
        """Make the graph of the network compacted to some of its channels, without a new trace.

        Args:
            kept: which channels are kept, bool ``[C]``.

        Returns:
            The graph with channels renumbered in their order and with the shapes and indices of the
            smaller tensors. Groups, their ids and the costs of any kept channels do not change.

        Raises:
            ValueError: ``kept`` has another shape or dtype, or keeps no channel of a group.
        """
        kept = self.without_inner(self._checked(kept))
        if empty := self.emptied_groups(kept):
            raise ValueError(f"kept: no channel is left of {empty[0]}, expected at least one per group")
        renumbered = np.where(kept, np.cumsum(kept) - 1, -1)
        names = self.kept_blocks(kept)
        tensors = {
            new: _cut_slots(slots, kept, renumbered, names)
            for name, slots in self.tensors.items()
            if (new := after_removal(name, names)) is not None
        }
        return replace(
            self,
            groups=tuple(
                renamed_group(g, renumbered[g.channels[kept[g.channels]]], names) for g in self.groups
            ),
            group_of=self.group_of[kept],
            tensors=tensors,
            gates=_cut_gates(self.gates, self.tensors, kept, names),
            costs=self.costs.restrict(kept),
            notes=_renamed_keys(self.notes, names),
            frozen=tuple(_renamed_keys(dict(self.frozen), names).items()),
            operations=tuple(op for op in self.operations if after_removal(op.module, names) is not None),
            blocks=restricted(self.blocks, kept, renumbered, names),
            constant_reads=_cut_reads(self.constant_reads, self.tensors, kept, names),
        )

    def without_inner(self, kept: np.ndarray) -> np.ndarray:
        """``kept`` (bool ``[C]``) without the channels inside of blocks that are not kept."""
        return closed(self.blocks, self.groups, kept) if self.blocks else kept

    def least_kept(self, wanted: Sequence[int] = ()) -> np.ndarray:
        """The smallest number of channels that every group keeps; see ``sparsekern.graph.blocks``."""
        return least_kept(self.blocks, self.groups, wanted)

    def emptied_groups(self, kept: np.ndarray) -> list[str]:
        """Names of the groups without a channel in ``kept`` (bool ``[C]``) that do not go with a block."""
        return emptied(self.blocks, self.groups, kept)

    def tensors_without(self, kept: np.ndarray) -> frozenset[str]:
        """Names of the tensors of blocks that are not in ``kept`` (bool ``[C]``)."""
        return frozenset[str]().union(*(b.tensors for b in self.blocks if not kept[b.channel]))

    def kept_blocks(self, kept: np.ndarray) -> dict[str, tuple[int, ...]]:
        """The numbers of the modules that stay, by path, in each list that loses blocks without ``kept``."""
        return kept_blocks(self.blocks, kept)

    def _number(self, name: str | int | Group) -> int:
        for group in self.groups:
            if name in (group.name, group.id) or name is group:
                return group.id
        raise ValueError(
            f"names: got {name!r}, expected groups of this graph "
            f"({', '.join(g.name for g in self.groups[:3])}, ...)"
        )

    def explain(self, name: str) -> str:
        """Describe the channels in a parameter, buffer or module, and why the other indices stay.

        Args:
            name: name of a parameter, buffer or module; "" for the whole network.

        Returns:
            One line for each dimension and reason.

        Raises:
            ValueError: nothing of that name was traced.
        """
        known = {alias: t.name for t in self.tensors.values() for alias in (t.name, *t.aliases)}
        names = {**{n: n for n in self.notes}, **known}
        found = {real for n, real in names.items() if n == name or n.startswith(f"{name}.") or not name}
        if not found:
            raise ValueError(f"name: got {name!r}, expected a module or parameter that was traced")
        return "\n".join(line for real in sorted(found) for line in self._explained(real))

    def _explained(self, name: str) -> list[str]:
        lines = []
        slots = self.tensors.get(name)
        for dim, channels in enumerate(slots.channels if slots else ()):
            if channels is None or slots is None:
                continue
            inside = sorted(set(self.group_of[channels[channels >= 0]].tolist()))
            count = int((channels >= 0).sum())
            where = ", ".join(self.groups[number].name for number in inside)
            lines.append(f"{name}, dim {dim}: {count} of {slots.shape[dim]} in {where}")
            reasons = dict.fromkeys(self.groups[number].inexact for number in inside)
            lines += [f"{name}, dim {dim}: not exact: {reason}" for reason in reasons if reason]
        for note in self.notes.get(name, ()):
            lines.append(f"{name}, dim {note.dim}: {note.count} stay: {note.reason}")
        return lines or [f"{name}: stays: has a single element in every dimension"]

    def __str__(self) -> str:
        return describe(self)


def _noted(graph: ChannelGraph, gone: np.ndarray, reason: str) -> dict[str, tuple[Note, ...]]:
    notes = dict(graph.notes)
    for name, slots in graph.tensors.items():
        for dim, channels in enumerate(slots.channels):
            if channels is None:
                continue
            count = int(gone[channels[channels >= 0]].sum())
            if count:
                notes[name] = (*notes.get(name, ()), Note(dim, count, reason))
    return notes


def _renumbered(
    tensors: dict[str, TensorSlots], new: np.ndarray, writers: set[str]
) -> dict[str, TensorSlots]:
    """The tensors with new channel ids; those without any are left out, unless they are writers of blocks."""
    result = {}
    for name, slots in tensors.items():
        channels: list[np.ndarray | None] = []
        for ids in slots.channels:
            moved = None if ids is None else np.where(ids >= 0, new[ids], -1)
            rows = name in writers and len(channels) == slots.row_dim
            channels.append(None if moved is None or ((moved < 0).all() and not rows) else moved)
        if any(ids is not None for ids in channels):
            result[name] = replace(slots, channels=tuple(channels))
    return result


def _staying(channels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Which indices of a dimension stay, bool. Indices that belong to no channel always stay."""
    stays: np.ndarray = np.append(kept, True)[channels]
    return stays


def _renamed_keys(given: Mapping[str, T], names: KeptBlocks) -> dict[str, T]:
    """The entries by the names that they have after blocks are removed, without those of the blocks."""
    if not names:
        return dict(given)
    moved = ((after_removal(name, names), value) for name, value in given.items())
    return {name: value for name, value in moved if name is not None}


def _cut_slots(
    slots: TensorSlots, kept: np.ndarray, renumbered: np.ndarray, names: KeptBlocks
) -> TensorSlots:
    channels = []
    for ids in slots.channels:
        own = None if ids is None else ids[_staying(ids, kept)]
        channels.append(None if own is None else np.where(own >= 0, renumbered[own], -1))
    shape = tuple(size if own is None else len(own) for size, own in zip(slots.shape, channels, strict=True))
    cut = replace(slots, shape=shape, channels=tuple(channels))
    if not names:
        return cut
    paths = ((after_removal(path, names), dim, per) for path, dim, per in slots.sizes)
    sizes = tuple((path, dim, per) for path, dim, per in paths if path is not None)
    rescale = None if slots.rescale is None else slots.rescale.renamed(partial(after_removal, kept=names))
    aliases = tuple(renamed(alias, names) for alias in slots.aliases)
    return replace(cut, name=renamed(slots.name, names), aliases=aliases, sizes=sizes, rescale=rescale)


def _cut_reads(
    reads: tuple[ConstantRead, ...], tensors: dict[str, TensorSlots], kept: np.ndarray, names: KeptBlocks
) -> tuple[ConstantRead, ...]:
    columns = {name: slots.channels[1] for name, slots in tensors.items() if len(slots.channels) > 1}
    stay = {name: _staying(ids, kept) for name, ids in columns.items() if ids is not None}
    cut = (read.restricted(stay.get(read.weight), names) for read in reads)
    return tuple(read for read in cut if read is not None)


def _cut_gates(gates: Gates, tensors: dict[str, TensorSlots], kept: np.ndarray, names: KeptBlocks) -> Gates:
    stays = np.ones(len(gates.rows), bool)
    for index, name in enumerate(gates.names):
        # Writers of a block lose rows with the channels that the blocks of a list share.
        stays[gates.tensors == index] = after_removal(name, names) is not None
        ids = _ids_of_rows(tensors[name])
        stays[gates.tensors == index] &= _staying(ids, kept)[gates.rows[gates.tensors == index]]
    left = _kept_gates(gates, ~kept, stays)
    rows = left.rows.copy()
    for index, name in enumerate(left.names):
        mine = left.tensors == index
        rows[mine] = (np.cumsum(_staying(_ids_of_rows(tensors[name]), kept)) - 1)[rows[mine]]
    return left._replace(rows=rows, names=tuple(renamed(name, names) for name in left.names))


def _ids_of_rows(slots: TensorSlots) -> np.ndarray:
    ids = None if slots.row_dim is None else slots.channels[slots.row_dim]
    assert ids is not None
    return ids


def _kept_gates(gates: Gates, gone: np.ndarray, stays: np.ndarray | None = None) -> Gates:
    """The gates of channels that are not ``gone``, of which only some rows ``stay``: bool, by entry."""
    channel = np.repeat(np.arange(len(gone)), np.diff(gates.offsets))
    kept = ~gone[channel]
    if stays is not None:
        kept &= stays
    counts = np.bincount(channel[kept], minlength=len(gone))
    used, tensors = np.unique(gates.tensors[kept], return_inverse=True)
    offsets = np.concatenate([[0], np.cumsum(counts[~gone])]).astype(np.int64)
    names = tuple(gates.names[i] for i in used)
    return Gates(offsets, tensors.astype(np.int64), gates.rows[kept], names)


def _merged(
    frozen: tuple[tuple[str, str], ...], names: Iterable[str], reason: str
) -> tuple[tuple[str, str], ...]:
    table = dict(frozen)
    for name in names:
        table.setdefault(name, reason)
    return tuple(table.items())
