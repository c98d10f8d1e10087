"""The parts of a tensor that is distributed over processes, sent one at a time to a new division."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsekern.distributed.tensors import Part


def spans(part: Part, size: int) -> list[tuple[int, int]]:
    """The first index and the end of each process's part, by rank in the part's group.

    Args:
        part: a position along a sharded dimension.
        size: length of that dimension.
    """
    ranks = dist.get_world_size(part.group)
    # Parts are as in torch.chunk: equal sizes rounded up, so that the last parts may be short or empty.
    chunk = -(-size // ranks)
    return [(min(chunk * rank, size), min(chunk * (rank + 1), size)) for rank in range(ranks)]


def sent(own: Tensor, shapes: list[tuple[int, ...]], group: Any) -> Iterator[tuple[int, Tensor]]:
    """Yield the tensor of each process in turn, with its rank; a process holds one of the others at a time.

    Args:
        own: this process's tensor, contiguous.
        shapes: the shape of each process's tensor, by rank in ``group``; empty ones are left out.
        group: the processes, which all have to go through all tensors.
    """
    rank = dist.get_rank(group)
    for source, shape in enumerate(shapes):
        tensor = own if source == rank else own.new_empty(shape)
        if tensor.numel():
            # Bytes, because not every backend sends every dtype.
            flat = tensor.view(-1).view(torch.uint8)
            dist.broadcast(flat, dist.get_global_rank(group, source), group=group)
            yield source, tensor


def overlap(piece: Tensor, dim: int, start: int, target: Part | None) -> tuple[Tensor, tuple[slice, ...]]:
    """The entries of ``piece`` that a local part has, and where they lie in it.

    Args:
        piece: a run of a whole tensor's indices along ``dim``, complete in all other dimensions.
        dim: the dimension.
        start: index of its first entry in the whole tensor.
        target: the position of the local part; None for the whole tensor.

    Returns:
        A view of ``piece``, possibly empty, and slices of the local part of the same shape.
    """
    where = [slice(None)] * piece.dim()
    if target is None or target.dim is None:
        where[dim] = slice(start, start + piece.shape[dim])
        return piece, tuple(where)
    if target.dim != dim:
        where[dim] = slice(start, start + piece.shape[dim])
        return piece.narrow(target.dim, target.start, target.size), tuple(where)
    low = max(start, target.start)
    high = max(low, min(start + piece.shape[dim], target.start + target.size))
    where[dim] = slice(low - target.start, high - target.start)
    if low == high:
        return piece.narrow(dim, 0, 0), tuple(where)
    return piece.narrow(dim, low - start, high - low), tuple(where)
