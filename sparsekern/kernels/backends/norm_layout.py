"""How the tensors of a normalisation lie in memory, as the kernels that are given them want it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Layout(NamedTuple):
    """Element (o, c, i) of a dense tensor lies at ``(o * channels + c) * inner + i``."""

    outer: int
    channels: int
    inner: int
    memory_format: torch.memory_format

    def holds(self, tensor: Tensor) -> bool:
        return tensor.is_contiguous(memory_format=self.memory_format)

    def dense(self, tensor: Tensor) -> Tensor:
        """``tensor`` where it lies so already, else a copy."""
        return tensor.contiguous(memory_format=self.memory_format)

    def empty(self, like: Tensor) -> Tensor:
        # Strides of dimensions of one element are kept where they do not matter.
        return (
            torch.empty_like(like)
            if self.holds(like)
            else torch.empty_like(like, memory_format=self.memory_format)
        )

    def returned(self, result: Tensor, like: Tensor) -> Tensor:
        """``result`` with the strides that an elementwise operation of torch gives it."""
        return result if self.holds(like) else torch.empty_like(like).copy_(result)


def layout_of(x: Tensor) -> Layout:
    """That of ``[N, C, ...]``; of another one than contiguous and channels last, the contiguous one."""
    channels_last = _CHANNELS_LAST.get(x.dim())
    channels, inner = x.shape[1], math.prod(x.shape[2:])
    if channels_last is not None and x.is_contiguous(memory_format=channels_last):
        return Layout(x.shape[0] * inner, channels, 1, channels_last)
    return Layout(x.shape[0], channels, inner, torch.contiguous_format)


def vector(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A number per channel in the compute type, dense."""
    return None if values is None else values.to(dtype).contiguous()
