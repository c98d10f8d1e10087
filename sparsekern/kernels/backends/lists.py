"""Memory shapes of tensors for the compiled backends, and the arrays of a table as native code takes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsekern.kernels.rows import CHANNEL_ARRAYS, ROW_ARRAYS

MemoryShape = tuple[int, int, int, int]
"""``(outer, rows, inner, start)`` of a tensor, see :func:`memory_shape`."""

row_arrays: Callable[[Any], tuple[Tensor, ...]] = attrgetter(*ROW_ARRAYS)
"""The flat arrays of a table, in the order of ``RowArrays`` in csrc/abi.h."""

channel_arrays: Callable[[Any], tuple[Tensor, ...]] = attrgetter(*CHANNEL_ARRAYS)
"""The arrays of ``channel_moments_``, in the order of the native structs."""


def memory_shapes(
    params: Sequence[Tensor],
    starts: list[int] | None,
    dims: list[int] | None,
    takes_kind: Callable[[Tensor], bool],
) -> list[MemoryShape] | None:
    """Memory shapes of all tensors of a list.

    Args:
        params: the tensors.
        starts: first row of each tensor, -1 for an untracked one; None when no tensor is tracked.
        dims: row dimension of each tensor; None when no tensor is tracked.
        takes_kind: whether the backend takes tensors of this device and dtype.

    Returns:
        ``(outer, rows, inner, start)`` of each tensor, see :func:`memory_shape`; None when the kernels
        cannot process one of the tensors.
    """
    shapes = []
    for i, param in enumerate(params):
        shape = memory_shape(param, starts[i] if starts else -1, dims[i] if dims else 0)
        if shape is None or not takes_kind(param):
            return None
        shapes.append(shape)
    return shapes


def memory_shape(param: Tensor, start: int, dim: int) -> MemoryShape | None:
    """Shape of a tensor in the order of its memory.

    Args:
        param: the tensor.
        start: its first row in the flat arrays; -1 when it is not tracked.
        dim: its row dimension.

    Returns:
        ``(outer, rows, inner, start)``: element ``(o, r, i)`` is at ``(o * rows + r) * inner + i``. An
        untracked tensor is one row. None when the tensor has gaps or no elements, or is not plain and dense.
    """
    is_plain = type(param) in (Parameter, Tensor) and param.layout is torch.strided and not param.is_neg()
    if not is_plain or param.numel() == 0:
        return None
    order = sorted((d for d in range(param.dim()) if param.shape[d] != 1), key=lambda d: -param.stride()[d])
    span = 1
    for d in reversed(order):
        if param.stride(d) != span:
            return None
        span *= param.shape[d]
    if start < 0:
        return 1, 1, param.numel(), -1
    if param.shape[dim] == 1:
        return 1, 1, param.numel(), start
    at = order.index(dim)
    outer = math.prod(param.shape[d] for d in order[:at])
    return outer, param.shape[dim], math.prod(param.shape[d] for d in order[at + 1 :]), start


def needed_rows(shapes: Sequence[MemoryShape]) -> int:
    """Number of rows that a table needs, so that it has those of every tensor."""
    return max((start + rows for _, rows, _, start in shapes if start >= 0), default=0)
