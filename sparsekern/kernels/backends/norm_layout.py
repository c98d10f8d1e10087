"""Memory layouts of the tensors of a normalisation that the kernels take, and tensors made in them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.kernels.activations import compute_dtype
from sparsekern.kernels.options import NormInputs

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Layout(NamedTuple):
    """A dense layout: element ``(o, c, i)`` is at ``(o * channels + c) * inner + i``.

    Attributes:
        outer: number of elements outside of the channel dimension in memory.
        channels: number of channels.
        inner: number of elements inside of the channel dimension in memory.
        memory_format: torch's name of the layout.
    """

    outer: int
    channels: int
    inner: int
    memory_format: torch.memory_format

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` has this layout."""
        return tensor.is_contiguous(memory_format=self.memory_format)

    def dense(self, tensor: Tensor) -> Tensor:
        """``tensor`` in this layout; a copy only where it has another one."""
        return tensor.contiguous(memory_format=self.memory_format)

    def empty(self, like: Tensor) -> Tensor:
        """An uninitialized tensor of the shape and dtype of ``like``, in this layout."""
        # Without a memory format, the strides of dimensions with one element stay those of `like`.
        return (
            torch.empty_like(like)
            if self.holds(like)
            else torch.empty_like(like, memory_format=self.memory_format)
        )

    def converted(self, inputs: NormInputs) -> NormInputs:
        """``inputs`` with data in this layout and dense vectors; copies only where they are not."""
        dtype = compute_dtype(inputs.x)
        return NormInputs(
            x=self.dense(inputs.x),
            residual=None if inputs.residual is None else self.dense(inputs.residual),
            weight=vector(inputs.weight, dtype),
            bias=vector(inputs.bias, dtype),
            mask=None if inputs.mask is None else inputs.mask.contiguous(),
        )

    def vectors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two uninitialized vectors ``[C]`` in the compute type of ``like``."""
        one = torch.empty(self.channels, dtype=compute_dtype(like), device=like.device)
        return one, torch.empty_like(one)

    def gradients(self, inputs: NormInputs) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Uninitialized results of a backward pass, in the order of ``norm_act_backward``."""
        residual = None if inputs.residual is None else self.empty(inputs.x)
        return self.empty(inputs.x), residual, *self.vectors(inputs.x)

    def returned_gradients(
        self, results: tuple[Tensor, Tensor | None, Tensor, Tensor], like: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """The results of a backward pass, data with the strides of :meth:`returned`."""
        grad_x, grad_residual, grad_weight, grad_bias = results
        residual = None if grad_residual is None else self.returned(grad_residual, like)
        return self.returned(grad_x, like), residual, grad_weight, grad_bias

    def returned(self, result: Tensor, like: Tensor) -> Tensor:
        """``result`` with the strides that an elementwise torch operation on ``like`` gives."""
        return result if self.holds(like) else torch.empty_like(like).copy_(result)


def layout_of(x: Tensor) -> Layout:
    """Layout of ``x`` ``[N, C, ...]``: channels-last where ``x`` has it, else contiguous."""
    channels_last = _CHANNELS_LAST.get(x.dim())
    channels, inner = x.shape[1], math.prod(x.shape[2:])
    if channels_last is not None and x.is_contiguous(memory_format=channels_last):
        return Layout(x.shape[0] * inner, channels, 1, channels_last)
    return Layout(x.shape[0], channels, inner, torch.contiguous_format)


def vector(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Per-channel ``values``, contiguous and in the compute type ``dtype``."""
    return None if values is None else values.to(dtype).contiguous()
