"""The places of a model's tensors that hold values of a channel."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern.distributed.tensors import is_sharded, local, part_of
from sparsekern.graph import ChannelGraph


class Kind(Enum):
    """The role of the entries of a place for a masked channel."""

    ROW = auto()
    """They produce its value: a value other than zero changes the masked network's output."""

    COLUMN = auto()
    """They are multiplied by its value, which is zero: only NaN and infinity change the output."""

    MASKED_COLUMN = auto()
    """They are multiplied by its value, a constant: a value other than zero changes the output."""

    BUFFER = auto()
    """Running statistics of its value before a scale of zero: only NaN and infinity change the output."""


_ZERO = (Kind.ROW, Kind.MASKED_COLUMN)


@dataclass(frozen=True, eq=False)
class Place:
    """One dimension of one tensor that channels run through.

    Attributes:
        name: name of the tensor, as in ``named_parameters()`` or ``named_buffers()``.
        kind: the role of its entries.
        dim: the dimension.
        channels: int64 ``[shape[dim]]``; the channel of each index, -1 for none.
    """

    name: str
    kind: Kind
    dim: int
    channels: np.ndarray

    def indices(self, chosen: np.ndarray) -> np.ndarray:
        """The indices, int64, of the channels ``chosen`` (bool ``[C]``)."""
        return np.flatnonzero((self.channels >= 0) & chosen[self.channels])


def places(graph: ChannelGraph) -> list[Place]:
    """All places that hold entries of channels, in the order of the graph's tensors."""
    columns = {column for group in graph.groups for column in group.consumers}
    masked = {column for group in graph.groups for column in group.masked_columns}
    found = []
    for name, slots in graph.tensors.items():
        for dim, channels in enumerate(slots.channels):
            if channels is None or not (channels >= 0).any():
                continue
            if slots.kind == "buffer":
                found.append(Place(name, Kind.BUFFER, dim, channels))
            elif dim == slots.row_dim:
                found.append(Place(name, Kind.ROW, dim, channels))
            elif (name, dim) in masked:
                found.append(Place(name, Kind.MASKED_COLUMN, dim, channels))
            elif (name, dim) in columns:
                found.append(Place(name, Kind.COLUMN, dim, channels))
    for block in graph.blocks:
        for name in block.writers:
            slots = graph.tensors[name]
            assert slots.row_dim is not None
            whole = np.full(slots.shape[slots.row_dim], block.channel, np.int64)
            found.append(Place(name, Kind.ROW, slots.row_dim, whole))
    return found


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and buffers as they are now, by every name."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return buffers | dict(model.named_parameters(remove_duplicate=False))


@torch.no_grad()
def clear(tensor: Tensor, place: Place, entries: np.ndarray, undo: ExitStack | None = None) -> None:
    """Set entries of a place to zero, as for a masked channel; each process changes its part of a tensor.

    Args:
        tensor: the tensor of the place, or optimizer state of its shape.
        place: the place. In a buffer only NaN and infinity are replaced by zero.
        entries: int64 indices along the place's dimension.
        undo: receives a callback that restores the entries.
    """
    mine, index, _ = entries_here(tensor, place.dim, entries)
    if not len(index):
        return
    if undo is not None:
        undo.callback(
            torch.no_grad()(mine.index_copy_), place.dim, index, mine.index_select(place.dim, index)
        )
    if place.kind is Kind.BUFFER:
        finite = mine.index_select(place.dim, index).nan_to_num_(0.0, 0.0, 0.0)
        mine.index_copy_(place.dim, index, finite)
    else:
        mine.index_fill_(place.dim, index, 0)


@torch.no_grad()
def written_entries(tensors: Mapping[str, Tensor], found: list[tuple[Place, np.ndarray]]) -> list[np.ndarray]:
    """The entries of each place that change the masked network's output, as int64 indices.

    The function synchronises with the device once. It checks only this process's part of a sharded tensor.
    """
    flags, whose = [], []
    for number, (place, entries) in enumerate(found):
        mine, index, at = entries_here(tensors[place.name], place.dim, entries)
        if not len(index) or not mine.is_floating_point():
            continue
        flags.append(_wrong(mine.index_select(place.dim, index), place))
        whose.append((number, entries[at]))
    bad = [np.zeros(0, np.int64) for _ in found]
    if flags:
        device = flags[0].device
        every = torch.cat([flag.to(device) for flag in flags]).cpu().numpy()
        stops = np.cumsum([len(flag) for flag in flags])[:-1]
        for (number, entries), own in zip(whose, np.split(every, stops), strict=True):
            bad[number] = entries[own]
    return bad


def _wrong(entries: Tensor, place: Place) -> Tensor:
    """Whether any value of each entry changes the output, bool ``[entries]``; overwrites ``entries``."""
    if place.kind not in _ZERO:
        # Finite values become 0, others NaN. In place, because entries may be most of the largest tensor.
        entries.sub_(entries)
    others = [dim for dim in range(entries.dim()) if dim != place.dim]
    return (entries != 0).any(others) if others else entries != 0


def entries_here(tensor: Tensor, dim: int, entries: np.ndarray) -> tuple[Tensor, Tensor, np.ndarray]:
    """This process's part of a tensor, indices into it on its device, and their positions in ``entries``."""
    mine, at = local(tensor), np.arange(len(entries))
    if is_sharded(tensor) and (part := part_of(tensor)).dim == dim:
        at = np.flatnonzero((entries >= part.start) & (entries < part.start + part.size))
        entries = entries - part.start
    return mine, torch.from_numpy(entries[at]).to(mine.device), at
