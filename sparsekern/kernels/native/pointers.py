"""Addresses of tensors, for a torch that does not tell them to native code by itself.

The only file that calls ``data_ptr``. An address holds for one call: storage may be exchanged behind a
tensor at any time, so nothing here is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Layout = tuple[list[int], list[int]]
"""Sizes and strides of a tensor."""

Place = tuple[int, int]
"""An address, and how much lies there."""

ARRAY_DTYPES = (torch.float32, torch.float32, torch.int32, *[torch.float32] * 3, torch.int64, torch.float32)
"""Of the flat arrays, in the order of ``RowArrays``."""


def layout(tensor: Tensor) -> Layout:
    return list(tensor.shape), list(tensor.stride())


def of_lists(
    lists: Sequence[Sequence[Tensor]],
    layouts: Sequence[Layout],
    dtype: torch.dtype,
    steps: int,
    device: torch.device,
) -> list[list[int]] | None:
    """Addresses of lists of tensors that all have ``dtype`` and, one by one, ``layouts``.

    Args:
        lists: each as long as ``layouts``, or empty.
        steps: position of the list that holds float32 step counters instead.
        device: where all of them lie.

    Returns:
        A list of addresses per list; None when a tensor is something else.
    """
    result = []
    for position, tensors in enumerate(lists):
        if tensors and len(tensors) != len(layouts):
            return None
        for tensor, expected in zip(tensors, layouts, strict=False):
            if position == steps:
                fits = tensor.dtype is torch.float32 and tensor.numel() == 1
            else:
                fits = tensor.dtype is dtype and _same(tensor, expected)
            if not fits or tensor.device != device or tensor.is_neg() or tensor.data_ptr() == 0:
                return None
        result.append([tensor.data_ptr() for tensor in tensors])
    return result


def of_arrays(arrays: Sequence[Tensor], device: torch.device) -> list[Place] | None:
    """Addresses of the flat arrays of a table, each with the number of its elements.

    Returns:
        None when an array is not contiguous on ``device``, or of another type than in the table.
    """
    dtypes = ARRAY_DTYPES if len(arrays) == len(ARRAY_DTYPES) else [array.dtype for array in arrays]
    for array, dtype in zip(arrays, dtypes, strict=True):
        if array.dtype is not dtype or array.device != device or not array.is_contiguous():
            return None
    return [(array.data_ptr(), array.numel()) for array in arrays]


def of_optional(tensors: Sequence[Tensor | None]) -> list[Place]:
    """Addresses of dense tensors that the caller holds until the call is over, and their bytes."""
    return [(0, 0) if tensor is None else (tensor.data_ptr(), tensor.nbytes) for tensor in tensors]


def of_tensor(tensor: Tensor) -> int:
    """Address of one tensor that the caller holds until the call is over."""
    return tensor.data_ptr()


def _same(tensor: Tensor, expected: Layout) -> bool:
    sizes, strides = layout(tensor)
    # The stride of a dimension of one element says nothing.
    return sizes == expected[0] and all(
        size == 1 or mine == theirs for size, mine, theirs in zip(sizes, strides, expected[1], strict=True)
    )
