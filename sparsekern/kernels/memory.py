"""Checks of the memory of tensors: a tensor that a call writes may overlap with no other tensor of the call.

Kernels read and write in several threads and in no fixed order. With overlapping memory the result would
depend on that order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sparsekern.kernels.native import pointers

_MOST_WORK = 100_000
"""Number of candidates that numpy tries before two tensors with gaps count as overlapping."""


class _Span(NamedTuple):
    """The address range of a tensor.

    Attributes:
        begin: address of the first byte.
        end: address behind the last byte.
        name: name of the argument.
        at: index in the argument, such as ``[3]``; empty for a single tensor.
        written: whether the call writes the tensor.
        tensor: the tensor.
    """

    begin: int
    end: int
    name: str
    at: str
    written: bool
    tensor: Tensor


def check_disjoint(
    written: Mapping[str, Sequence[Tensor]], read: Mapping[str, Sequence[Tensor]] | None = None
) -> None:
    """Check that each written tensor shares no memory with another tensor.

    Tensors without memory (fake, meta, sparse, empty) are ignored.

    Args:
        written: tensors that the call writes, keyed by the name of the argument.
        read: tensors that the call only reads, likewise. They may share memory with each other.

    Raises:
        ValueError: a written tensor overlaps with another tensor.
    """
    spans = sorted([*_spans(written, True), *_spans(read or {}, False)], key=lambda span: span.begin)
    open_spans: list[_Span] = []
    for span in spans:
        open_spans = [other for other in open_spans if other.end > span.begin]
        for other in open_spans:
            if (span.written or other.written) and _share(span.tensor, other.tensor):
                one, two = (span, other) if span.written else (other, span)
                raise ValueError(
                    f"{one.name}{one.at}: got memory that {two.name}{two.at} has too, expected its own"
                )
        open_spans.append(span)


def repeats(tensor: Tensor) -> bool:
    """Whether elements of a tensor may share an address, as in an expanded tensor or a sliding window."""
    reach = 0
    if any(size == 0 for size in tensor.shape):
        return False
    dims = [(step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]
    for step, size in sorted(dims, key=lambda dim: dim[0]):
        if step <= reach:
            return True
        reach += (size - 1) * step
    return False


def is_whole(tensor: Tensor) -> bool:
    """Whether the storage holds every element. It does not after the storage alone was resized."""
    if not _has_memory(tensor):
        return True
    bytes_needed = (tensor.storage_offset() + _reach(tensor)) * tensor.element_size()
    return tensor.untyped_storage().nbytes() >= bytes_needed


def _spans(lists: Mapping[str, Sequence[Tensor]], written: bool) -> Iterable[_Span]:
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            if _has_memory(tensor):
                begin = pointers.address_of(tensor)
                end = begin + _reach(tensor) * tensor.element_size()
                yield _Span(begin, end, name, f"[{i}]" if len(tensors) > 1 else "", written, tensor)


def _has_memory(tensor: Tensor) -> bool:
    plain = tensor.layout is torch.strided and not isinstance(tensor, FakeTensor)
    return plain and tensor.device.type != "meta" and tensor.numel() > 0


def _reach(tensor: Tensor) -> int:
    """Number of elements from the first to the last one, gaps included."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _share(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors with overlapping spans share an element. One may be in the gaps of the other."""
    if _reach(one) == one.numel() and _reach(other) == other.numel():
        return True
    try:
        # The stubs of numpy declare only two of the values that `max_work` takes.
        limit: Any = _MOST_WORK
        return np.shares_memory(_shadow(one), _shadow(other), max_work=limit)
    except np.exceptions.TooHardError:
        return True


class _Shadow:
    """An object whose array interface describes the memory of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "data": (pointers.address_of(tensor), True),
            "shape": tuple(tensor.shape),
            "strides": tuple(step * size for step in tensor.stride()),
            "typestr": f"|V{size}",
        }


def _shadow(tensor: Tensor) -> np.ndarray:
    """An array with the addresses of ``tensor``. Its content is not read, because it may be on a GPU."""
    return np.asarray(_Shadow(tensor))


def kind_of(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    """What tensors of one list entry have in common: shape, dtype and device."""
    return tensor.shape, tensor.dtype, tensor.device


def describe(tensor: Tensor) -> str:
    """Dtype, shape, device and layout of a tensor, for messages."""
    layout = "" if tensor.layout is torch.strided else f" ({tensor.layout})"
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}{layout}"
