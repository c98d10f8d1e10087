"""Building the channel graph from slots and records: channels, groups, gates and costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from sparsekern.graph.blocks import Block, block_groups, groups_inside, with_block_gates, with_writers
from sparsekern.graph.channels import ChannelGraph
from sparsekern.graph.cost import CostBuilder, CostModel
from sparsekern.graph.groups import Gates, Group, Note, TensorSlots
from sparsekern.graph.propagate.interpret import Tracked
from sparsekern.graph.propagate.numbering import Numbering, row_ids
from sparsekern.graph.propagate.operations import Operation
from sparsekern.graph.propagate.records import Producer, Records
from sparsekern.graph.propagate.slots import Slots
from sparsekern.graph.propagate.takeover import constant_reads
from sparsekern.graph.prove.blocks import FoundBlock

_NO_CHANNELS = "no layer makes or reads channels along it"


def build(
    tensors: Sequence[Tracked],
    slots: Slots,
    records: Records,
    numbering: Numbering,
    untraced: str = "",
    found: Sequence[FoundBlock] = (),
    sizes: Mapping[str, int] | None = None,
) -> ChannelGraph:
    """Build the public graph, with names in place of numbers.

    Args:
        tensors: the registered tensors with their slots.
        slots: all slots.
        records: the records of the settled interpretation.
        numbering: the numbers of channels and groups.
        untraced: why training mode was not traced; empty if it was.
        found: the blocks that can be removed, list by list.
        sizes: the number of modules in their lists, by path.

    Returns:
        The channel graph.
    """
    groups = _groups(tensors, numbering, records, slots)
    blocks = _blocks(tensors, groups, found, len(numbering.group_of), sizes or {})
    of_blocks = block_groups(blocks, len(groups), {group.name for group in groups})
    group_of = [numbering.group_of, *(np.full(len(g.channels), g.id, np.int64) for g in of_blocks)]
    groups += of_blocks
    costs, operations = _costs(tensors, numbering, records, blocks, np.concatenate(group_of))
    named = {t.entry.names[0]: s for t in tensors if (s := _tensor(t, numbering)) is not None}
    notes = _notes(tensors, numbering, slots)
    written = [tensors[number].entry for block in found for number in block.writers]
    all_named = with_writers(named, {e.names[0]: (e.names[1:], e.shape) for e in written})
    return ChannelGraph(
        groups=groups,
        group_of=np.concatenate(group_of),
        tensors=all_named,
        gates=with_block_gates(_gates(tensors, numbering, records, slots), blocks, all_named),
        frozen=_frozen(tensors, notes, records, slots) + _left_alone(tensors, named, notes, records, slots),
        costs=costs,
        notes=notes,
        operations=operations,
        untraced=untraced,
        blocks=blocks,
        constant_reads=constant_reads(tensors, records),
    )


def _blocks(
    tensors: Sequence[Tracked],
    groups: Sequence[Group],
    found: Sequence[FoundBlock],
    first: int,
    sizes: Mapping[str, int],
) -> tuple[Block, ...]:
    """The blocks with names, and with channel ids from ``first`` on."""
    blocks = []
    for number, block in enumerate(found):
        names = frozenset(tensors[n].entry.names[0] for n in block.tensors)
        writers = tuple(tensors[n].entry.names[0] for n in block.writers)
        inside, size = groups_inside(groups, names), sizes[block.container]
        blocks.append(Block(block.container, block.index, size, first + number, writers, names, inside))
    return tuple(blocks)


def _tensor(tensor: Tracked, numbering: Numbering) -> TensorSlots | None:
    channels = []
    for ids in tensor.ids:
        own = None if ids is None else numbering.channel_of[ids]
        channels.append(None if own is None or (own < 0).all() else own)
    if all(own is None for own in channels):
        return None
    entry = tensor.entry
    kind: Literal["parameter", "buffer"] = "parameter" if entry.parameter else "buffer"
    return TensorSlots(
        entry.names[0],
        entry.names[1:],
        entry.shape,
        kind,
        tuple(channels),
        tensor.row_dim,
        tensor.sizes,
        tensor.rescale,
    )


def _groups(
    tensors: Sequence[Tracked], numbering: Numbering, records: Records, slots: Slots
) -> tuple[Group, ...]:
    count = int(numbering.group_of.max()) + 1 if len(numbering.group_of) else 0
    members: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for index, tensor in enumerate(tensors):
        for dim, ids in enumerate(tensor.ids):
            own = np.empty(0, np.int64) if ids is None else numbering.channel_of[ids]
            for group in np.unique(numbering.group_of[own[own >= 0]]):
                members[group].append((index, dim))
    inside_of: dict[tuple[int, int], list[int]] = {}
    for group, inside in enumerate(members):
        for pair in inside:
            inside_of.setdefault(pair, []).append(group)
    makers = _by_group(_makers(records, slots), inside_of)
    consumers = _by_group(records.consumers, inside_of)
    starts = np.searchsorted(numbering.group_of, np.arange(count + 1))
    inexact = _inexact(numbering, records)
    masked = _by_group(_masked_columns(numbering, records, slots), inside_of)
    groups: list[Group] = []
    taken: set[str] = set()
    for number, inside in enumerate(members):
        names = [(tensors[i].entry.names[0], dim) for i, dim in inside]
        producers = [tensors[i].entry.names[0] for i, _ in makers.get(number, ())]
        consumed = [(tensors[i].entry.names[0], dim) for i, dim in consumers.get(number, ())]
        rows = [tensors[i].entry.names[0] for i, dim in inside if tensors[i].row_dim == dim]
        name = _unused(_owner((producers or rows)[0]), taken)
        channels = np.arange(starts[number], starts[number + 1], dtype=np.int64)
        weights = tuple(producers), tuple(names), tuple(consumed)
        columns = tuple((tensors[i].entry.names[0], dim) for i, dim in masked.get(number, ()))
        groups.append(
            Group(number, name, channels, *weights, inexact.get(number, ""), masked_columns=columns)
        )
    return tuple(groups)


def _inexact(numbering: Numbering, records: Records) -> dict[int, str]:
    """The groups whose removal is not exact, each with its first reason."""
    found: dict[int, str] = {}
    for ids, reason in records.inexact:
        channels = numbering.channel_of[ids[ids >= 0]]
        for group in np.unique(numbering.group_of[channels[channels >= 0]]).tolist():
            found.setdefault(group, reason)
    return found


def _masked_columns(numbering: Numbering, records: Records, slots: Slots) -> list[tuple[int, int]]:
    """The distinct (tensor, dimension) pairs of columns that read a channel which is constant when masked."""
    found: dict[tuple[int, int], None] = {}
    for columns in records.masked_columns:
        found.update(dict.fromkeys(slots.owners(columns[numbering.channel_of[columns] >= 0])))
    return list(found)


def _by_group(
    pairs: Iterable[tuple[int, int]], inside_of: Mapping[tuple[int, int], Sequence[int]]
) -> dict[int, list[tuple[int, int]]]:
    """The (tensor, dimension) pairs that each group runs through, by group."""
    found: dict[int, list[tuple[int, int]]] = {}
    for pair in pairs:
        for group in inside_of.get(pair, ()):
            found.setdefault(group, []).append(pair)
    return found


def _makers(records: Records, slots: Slots) -> list[tuple[int, int]]:
    """The distinct (tensor, dimension) pairs of weights that make channels, depthwise ones last."""
    found: dict[tuple[int, int], None] = {}
    for depthwise in (False, True):
        for producer in records.producers:
            if producer.kind != "norm" and (producer.kind == "depthwise") == depthwise:
                found.update(dict.fromkeys(slots.owners(producer.rows)))
    return list(found)


def _owner(name: str) -> str:
    return name.rpartition(".")[0] or name


def _unused(name: str, taken: set[str]) -> str:
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name}:{number}"
    taken.add(candidate)
    return candidate


def _gates(tensors: Sequence[Tracked], numbering: Numbering, records: Records, slots: Slots) -> Gates:
    consumed = [p for p in records.producers if p.consumed]
    channels = [_gate_rows(p, records) for p in consumed]
    live, ids = _by_channel(channels, [_channels(p, numbering) for p in consumed], numbering)
    # Channels whose producers are all unconsumed still need rows to fade out.
    everything = [np.concatenate([p.rows, p.bias]) for p in records.producers]
    if len(np.unique(live)) < len(numbering.group_of):
        own = [_channels(p, numbering) for p in records.producers]
        more, more_ids = _by_channel(
            [*everything, *row_ids(tensors, records)],
            [*own, *[None] * len(row_ids(tensors, records))],
            numbering,
        )
        bare = ~np.isin(more, live)
        live, ids = np.concatenate([live, more[bare]]), np.concatenate([ids, more_ids[bare]])
    # Pairs as one number each: `np.unique` over rows of two sorts ten times slower.
    span = int(ids.max(initial=0)) + 1
    live, ids = np.divmod(np.unique(live * span + ids), span)
    tensor, _, row = slots.locate(ids)
    used, index = np.unique(tensor, return_inverse=True)
    counts = np.bincount(live, minlength=len(numbering.group_of))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    names = tuple(tensors[i].entry.names[0] for i in used)
    return Gates(offsets, index.reshape(-1).astype(np.int64), row, names)


def _channels(producer: Producer, numbering: Numbering) -> np.ndarray:
    return np.unique(numbering.channel_of[producer.rows])


def _gate_rows(producer: Producer, records: Records) -> np.ndarray:
    """Raw ids of the rows that set the scale of the producer's output."""
    if producer.norms and not producer.mixed:
        own = [_gate_rows(records.producers[n], records) for n in dict.fromkeys(producer.norms)]
        return np.concatenate(own)
    return np.concatenate([producer.rows, producer.bias])


def _by_channel(
    rows: Sequence[np.ndarray], own: Sequence[np.ndarray | None], numbering: Numbering
) -> tuple[np.ndarray, np.ndarray]:
    """Find the channels of rows.

    Args:
        rows: raw ids of rows, one array for each producer.
        own: the channels of each producer; None accepts any channel.
        numbering: the numbers of channels.

    Returns:
        Channel and raw id of every row whose channel is one of its producer's.
    """
    live, kept = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for ids, channels in zip(rows, own, strict=True):
        channel = numbering.channel_of[ids]
        inside = channel >= 0
        if channels is not None:
            inside &= np.isin(channel, channels)
        live.append(channel[inside])
        kept.append(ids[inside])
    return np.concatenate(live), np.concatenate(kept)


def _costs(
    tensors: Sequence[Tracked],
    numbering: Numbering,
    records: Records,
    blocks: Sequence[Block],
    group_of: np.ndarray,
) -> tuple[CostModel, tuple[Operation, ...]]:
    """The costs, and the operations. The sizes of operations are extents of the cost model.

    A block is one more factor of every term inside of it: 1 if the block is kept, else 0.
    """
    builder = CostBuilder(len(group_of))
    channel_of = {name: block.channel for block in blocks for name in block.tensors}
    for tensor in tensors:
        if tensor.entry.parameter:
            scale, factors = 1, _factor(channel_of.get(tensor.entry.names[0]))
            for size, ids in zip(tensor.entry.shape, tensor.ids, strict=True):
                if ids is None:
                    scale *= size
                else:
                    factors.append(numbering.channel_of[ids])
            builder.add("params", scale, factors)
    for measure, terms in (("macs", records.macs), ("activations", records.activations)):
        for term in terms:
            factors = _factor(next((b.channel for b in blocks if b.has(term.module)), None))
            factors += [np.where(ids >= 0, numbering.channel_of[ids], -1) for ids in term.factors]
            builder.add(measure, term.scale, factors)
    operations = tuple(entry.numbered(numbering.channel_of, builder.extent) for entry in records.operations)
    return builder.build(group_of), operations


def _factor(channel: int | None) -> list[np.ndarray]:
    return [] if channel is None else [np.array([channel], np.int64)]


def _notes(tensors: Sequence[Tracked], numbering: Numbering, slots: Slots) -> dict[str, tuple[Note, ...]]:
    """Why indices of every dimension larger than 1 stay, with the most frequent reasons first."""
    notes = {}
    for tensor in tensors:
        own = []
        for dim, ids in enumerate(tensor.ids):
            given = numbering.reasons[[] if ids is None else ids[numbering.channel_of[ids] < 0]]
            numbers, counts = np.unique(given, return_counts=True)
            for k in np.argsort(-counts, kind="stable"):
                reason = slots.reasons[numbers[k]] if numbers[k] >= 0 else _NO_CHANNELS
                own.append(Note(dim, int(counts[k]), reason))
        notes[tensor.entry.names[0]] = tuple(own)
    return notes


def _frozen(
    tensors: Sequence[Tracked],
    notes: dict[str, tuple[Note, ...]],
    records: Records,
    slots: Slots,
) -> tuple[tuple[str, str], ...]:
    """The most frequent reason why rows stay, for every weight that makes channels."""
    table = []
    for index, dim in _makers(records, slots):
        tensor = tensors[index]
        name, size = tensor.entry.names[0], tensor.entry.shape[dim]
        of_rows = [note for note in notes.get(name, ()) if note.dim == dim]
        if of_rows:
            stay = sum(note.count for note in of_rows)
            part = "" if stay == size else f" ({stay} of {size} rows)"
            table.append((name, f"{of_rows[0].reason}{part}"))
    return tuple(table)


def _left_alone(
    tensors: Sequence[Tracked],
    named: Mapping[str, TensorSlots],
    notes: Mapping[str, Sequence[Note]],
    records: Records,
    slots: Slots,
) -> tuple[tuple[str, str], ...]:
    """The other parameters that no channel runs through, each with a reason.

    The reason of the row dimension comes first, then any reason other than the lack of a layer.
    """
    makers = {tensors[index].entry.names[0] for index, _ in _makers(records, slots)}
    table = []
    for tensor in tensors:
        name = tensor.entry.names[0]
        if not tensor.entry.parameter or name in makers or name in named:
            continue
        of_rows = [note for note in notes[name] if note.dim == tensor.row_dim]
        told = of_rows or [note for note in notes[name] if note.reason != _NO_CHANNELS] or notes[name]
        table.append((name, told[0].reason if told else "has a single element in every dimension"))
    return tuple(table)
