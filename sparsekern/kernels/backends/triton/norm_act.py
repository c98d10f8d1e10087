"""Normalisation with its activation in Triton; compiled and tested in its interpreter, never run on a GPU.

This backend is the counterpart of :mod:`sparsekern.kernels.backends.cuda.norm_act` and has the same passes.
Element (o, c, i) of x is at ``(o * channels + c) * inner + i``. A tile has ``CHANNELS`` times
``OUTER * INNER`` elements, in two axes. A program processes ``turns`` tiles of the same channels one after
the other and stores partial sums in float64. A small launch merges these in the order of the programs. The
division of tensors depends on shapes alone, and there are no atomic additions.

With ``TRITON_INTERPRET=1``, set before triton is imported, the backend takes tensors on the CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sparsekern.kernels.backends.norm_layout import Layout, layout_of, vector
from sparsekern.kernels.backends.reference import norm_act as reference_norm
from sparsekern.kernels.backends.triton import norm_backward_kernels, norm_forward_kernels
from sparsekern.kernels.backends.triton.launch import OPTIONS, compute_type, device_of
from sparsekern.kernels.counts import ChannelCounts

# Elements per tile and warps per program, for 8 elements per thread. With 16 the sums spill registers.
_TILE, WARPS = 2048, 8

# Most channels per tile if channels are adjacent in memory.
_CHANNELS = 128

# Least number of tiles per program, and approximate number of programs for a large tensor.
_LEAST_TURNS, _PROGRAMS = 2, 1024

# Partial sums and channels that a merging program reads at once.
_PIECES, _MERGED = 64, 16

# Channels that the `count` kernel reads at once.
_COUNTED = 1024


class Cut(NamedTuple):
    """Division of a tensor into tiles and programs.

    Attributes:
        tile_channels: channels per tile.
        tile_outer: outer indices per tile.
        tile_inner: inner elements per tile.
        turns: tiles that a program processes one after the other.
        groups: programs along the channels.
        pieces: programs for the same channels.
    """

    tile_channels: int
    tile_outer: int
    tile_inner: int
    turns: int
    groups: int
    pieces: int


def cut_of(layout: Layout) -> Cut:
    """The division of a tensor with this layout; it depends on the shape alone."""
    channels = min(_CHANNELS, triton.next_power_of_2(layout.channels)) if layout.inner == 1 else 1
    inner = min(_TILE, triton.next_power_of_2(layout.inner))
    outer = _TILE // (channels * inner) or 1
    groups = triton.cdiv(layout.channels, channels)
    tiles = triton.cdiv(layout.outer, outer) * triton.cdiv(layout.inner, inner)
    turns = max(_LEAST_TURNS, triton.cdiv(tiles * groups, _PROGRAMS))
    return Cut(channels, outer, inner, turns, groups, triton.cdiv(tiles, turns))


def norm_act_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mask: Tensor | None,
    *,
    activation: str,
    training: bool,
    eps: float,
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`sparsekern.kernels.backends.reference.norm_act.norm_act_forward`."""
    layout, dtype = layout_of(x), reference_norm.compute_dtype(x)
    cut, shape = cut_of(layout), _shape(layout)
    x_dense, masked, y = layout.dense(x), _bytes(mask), layout.empty(x)
    mean, var = vector(running_mean, dtype), vector(running_var, dtype)
    with device_of(x):
        if training:
            used_mean = torch.empty(layout.channels, dtype=dtype, device=x.device)
            used_var = torch.empty_like(used_mean)
            parts = _parts(layout, cut, x)
            norm_forward_kernels.moments[cut.groups, cut.pieces](
                x_dense, masked, parts, *shape, **_tile(cut, dtype)
            )
            norm_forward_kernels.merge_moments[(triton.cdiv(layout.channels, _MERGED),)](
                parts, masked, mean, var, used_mean, used_var, *_elements(layout), **_merge(cut, dtype)
            )
        else:
            assert mean is not None and var is not None
            used_mean, used_var = mean.clone(), var.clone()
        norm_forward_kernels.normalise[cut.groups, cut.pieces](
            x_dense,
            None if residual is None else layout.dense(residual),
            y,
            vector(weight, dtype),
            vector(bias, dtype),
            used_mean,
            used_var,
            masked,
            *shape,
            EPS=eps,
            ACTIVATION=reference_norm.ACTIVATIONS.index(activation),
            **_tile(cut, dtype),
        )
        if training and momentum and running_mean is not None and running_var is not None:
            elements = x.numel() // x.shape[1]
            reference_norm.track(running_mean, running_var, used_mean, used_var, elements, momentum)
    return layout.returned(y, x), used_mean, used_var


def norm_act_backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None,
    *,
    activation: str,
    training: bool,
    eps: float,
    counts: ChannelCounts | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """See :func:`sparsekern.kernels.backends.reference.norm_act.norm_act_backward`."""
    layout, dtype = layout_of(x), reference_norm.compute_dtype(x)
    cut, shape = cut_of(layout), _shape(layout)
    masked, weight, bias = _bytes(mask), vector(weight, dtype), vector(bias, dtype)
    operands = (
        layout.dense(grad),
        layout.dense(x),
        None if residual is None else layout.dense(residual),
        weight,
        bias,
        vector(mean, dtype),
        vector(var, dtype),
        masked,
    )
    grad_x = layout.empty(x)
    grad_residual = None if residual is None else layout.empty(x)
    grad_weight = torch.empty(layout.channels, dtype=dtype, device=x.device)
    grad_bias = torch.empty_like(grad_weight)
    parts = _parts(layout, cut, x)
    sums = torch.empty(4, layout.channels, dtype=torch.float64, device=x.device)
    threshold = None if counts is None else counts.threshold
    options = _tile(cut, dtype) | {
        "EPS": eps,
        "ACTIVATION": reference_norm.ACTIVATIONS.index(activation),
    }
    with device_of(x):
        norm_backward_kernels.sum_up[cut.groups, cut.pieces](*operands, threshold, parts, *shape, **options)
        norm_backward_kernels.merge_sums[(triton.cdiv(layout.channels, _MERGED),)](
            parts,
            masked,
            var,
            grad_weight,
            grad_bias,
            sums,
            *_elements(layout),
            EPS=eps,
            **_merge(cut, dtype),
        )
        norm_backward_kernels.descend[cut.groups, cut.pieces](
            *operands, sums, grad_x, grad_residual, *shape, TRAINING=training, **options
        )
        if counts is not None:
            # torch copies the results, so that autograd sees the writes.
            new = [torch.empty_like(counts.threshold), torch.empty_like(counts.activity)]
            norm_backward_kernels.count[(1,)](
                sums,
                weight,
                bias,
                masked,
                counts.threshold,
                counts.activity,
                *new,
                *_elements(layout),
                TAU=counts.tau,
                DECAY=counts.decay,
                BLOCK=_COUNTED,
                **OPTIONS,
            )
            counts.threshold.copy_(new[0])
            counts.activity.copy_(new[1])
            counts.updates.add_(1)
    return (
        layout.returned(grad_x, x),
        None if grad_residual is None else layout.returned(grad_residual, x),
        grad_weight,
        grad_bias,
    )


def _shape(layout: Layout) -> tuple[int, int, int]:
    """Channels, outer size and inner size: the order of the kernels' arguments."""
    return layout.channels, layout.outer, layout.inner


def _elements(layout: Layout) -> tuple[int, int]:
    """The number of channels, and the elements of each."""
    return layout.channels, layout.outer * layout.inner


def _tile(cut: Cut, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of kernels that process tiles."""
    return {
        "turns": cut.turns,
        "CHANNELS": cut.tile_channels,
        "OUTER": cut.tile_outer,
        "INNER": cut.tile_inner,
        "COMPUTE": compute_type(dtype),
        "num_warps": WARPS,
        **OPTIONS,
    }


def _merge(cut: Cut, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of kernels that merge partial sums."""
    return {
        "pieces": cut.pieces,
        "CHANNELS": _MERGED,
        "PIECES": _PIECES,
        "COMPUTE": compute_type(dtype),
        **OPTIONS,
    }


def _parts(layout: Layout, cut: Cut, x: Tensor) -> Tensor:
    """Memory for the partial sums: float64 ``[4, pieces, channels]``."""
    return torch.empty(4, cut.pieces, layout.channels, dtype=torch.float64, device=x.device)


def _bytes(mask: Tensor | None) -> Tensor | None:
    """The bool mask as uint8, which the kernels read; None stays None."""
    return None if mask is None else mask.contiguous().view(torch.uint8)
