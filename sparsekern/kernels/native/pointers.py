"""Addresses of tensors, for versions of torch whose native code interface does not give them.

This is the only file that calls ``data_ptr``. An address is valid for one call: the storage of a tensor may
be replaced at any time, so no address is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Layout = tuple[list[int], list[int]]
"""Sizes and strides of a tensor."""

Place = tuple[int, int]
"""``(address, size)``; the size is a number of elements or of bytes, see each function."""

ARRAY_DTYPES = (torch.float32, torch.float32, torch.int32, *[torch.float32] * 3, torch.int64, torch.float32)
"""Dtypes of the flat arrays, in the order of ``RowArrays``."""


def layout(tensor: Tensor) -> Layout:
    """Sizes and strides of ``tensor``."""
    return list(tensor.shape), list(tensor.stride())


def addresses_of_lists(
    lists: Sequence[Sequence[Tensor]],
    layouts: Sequence[Layout],
    dtype: torch.dtype,
    steps: int,
    device: torch.device,
) -> list[list[int]] | None:
    """Addresses of lists of tensors, after a comparison with the expected dtype, layouts and device.

    Args:
        lists: lists of tensors; each list is empty or as long as ``layouts``.
        layouts: sizes and strides that tensor ``i`` of each list has to have.
        dtype: dtype that all tensors have to have.
        steps: position of the list of step counters, which are float32 with one element.
        device: device that all tensors have to be on.

    Returns:
        One list of addresses per list of tensors; None when a tensor does not match.
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


def addresses_of_arrays(arrays: Sequence[Tensor], device: torch.device) -> list[Place] | None:
    """Addresses of the flat arrays of a table.

    Returns:
        ``(address, number of elements)`` of each array; None when an array is not contiguous, is not on
        ``device`` or has another dtype than the table's.
    """
    dtypes = ARRAY_DTYPES if len(arrays) == len(ARRAY_DTYPES) else [array.dtype for array in arrays]
    for array, dtype in zip(arrays, dtypes, strict=True):
        if array.dtype is not dtype or array.device != device or not array.is_contiguous():
            return None
    return [(array.data_ptr(), array.numel()) for array in arrays]


def optional_addresses(tensors: Sequence[Tensor | None]) -> list[Place]:
    """``(address, bytes)`` of each dense tensor, ``(0, 0)`` for None.

    The caller keeps the tensors alive until its native call returns.
    """
    return [(0, 0) if tensor is None else (tensor.data_ptr(), tensor.nbytes) for tensor in tensors]


def address_of(tensor: Tensor) -> int:
    """Address of a tensor. The caller keeps the tensor alive until its native call returns."""
    return tensor.data_ptr()


def _same(tensor: Tensor, expected: Layout) -> bool:
    """Whether ``tensor`` has the expected sizes and strides."""
    sizes, strides = layout(tensor)
    # The stride of a dimension with one element has no effect.
    return sizes == expected[0] and all(
        size == 1 or mine == theirs for size, mine, theirs in zip(sizes, strides, expected[1], strict=True)
    )
