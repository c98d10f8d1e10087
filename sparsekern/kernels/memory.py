"""Which memory tensors lie in: what a call writes may overlap with nothing else of that call.

Kernels read and write in an order of their own, in several threads. Overlapping memory would make the result
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
"""How many candidates numpy tries before two tensors with gaps count as overlapping."""


class _Span(NamedTuple):
    """The bytes from the first to the last element of a tensor, and what the tensor is called."""

    begin: int
    end: int
    name: str
    at: str
    written: bool
    tensor: Tensor


def check_disjoint(
    written: Mapping[str, Sequence[Tensor]], read: Mapping[str, Sequence[Tensor]] | None = None
) -> None:
    """What is written shares no memory with anything else.

    Tensors without memory (fake, meta, sparse, empty) are left out.

    Args:
        written: by the name of the argument.
        read: likewise; these may share memory among themselves.

    Raises:
        ValueError: a tensor that is written overlaps with another one.
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
    """Whether elements may lie in the same place, as in an expanded tensor or a sliding window."""
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
    """Whether the storage holds every element; not when it was resized behind the tensor."""
    if not _has_memory(tensor):
        return True
    bytes_needed = (tensor.storage_offset() + _reach(tensor)) * tensor.element_size()
    return tensor.untyped_storage().nbytes() >= bytes_needed


def _spans(lists: Mapping[str, Sequence[Tensor]], written: bool) -> Iterable[_Span]:
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            if _has_memory(tensor):
                begin = pointers.of_tensor(tensor)
                end = begin + _reach(tensor) * tensor.element_size()
                yield _Span(begin, end, name, f"[{i}]" if len(tensors) > 1 else "", written, tensor)


def _has_memory(tensor: Tensor) -> bool:
    plain = tensor.layout is torch.strided and not isinstance(tensor, FakeTensor)
    return plain and tensor.device.type != "meta" and tensor.numel() > 0


def _reach(tensor: Tensor) -> int:
    """Elements from the first to the last one, gaps included."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _share(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors whose spans overlap share an element; they may lie in each other's gaps."""
    if _reach(one) == one.numel() and _reach(other) == other.numel():
        return True
    try:
        # The stubs know two of the limits that numpy takes.
        limit: Any = _MOST_WORK
        return np.shares_memory(_shadow(one), _shadow(other), max_work=limit)
    except np.exceptions.TooHardError:
        return True


class _Shadow:
    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "data": (pointers.of_tensor(tensor), True),
            "shape": tuple(tensor.shape),
            "strides": tuple(step * size for step in tensor.stride()),
            "typestr": f"|V{size}",
        }


def _shadow(tensor: Tensor) -> np.ndarray:
    """An array at the same addresses, whose content is not looked at: it may lie on a GPU."""
    return np.asarray(_Shadow(tensor))
