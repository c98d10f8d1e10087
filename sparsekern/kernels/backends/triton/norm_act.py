"""Normalisation with its activation in Triton; compiled and tested in its interpreter, never run on a GPU.

This backend is the counterpart of :mod:`sparsekern.kernels.backends.cuda.norm_act` and has the same passes.
Element (o, c, i) of x is at ``(o * channels + c) * inner + i``. A tile has ``CHANNELS`` times
``OUTER * INNER`` elements, in two axes. A program processes ``tiles`` tiles of the same channels one after
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
from sparsekern.kernels.options import Moments, NormInputs, NormOptions, Running

# Elements per tile and warps per program, for 8 elements per thread. With 16 the sums spill registers.
_TILE, WARPS = 2048, 8

# Most channels per tile if channels are adjacent in memory.
_CHANNELS = 128

# Least number of tiles per program, and approximate number of programs for a large tensor.
_LEAST_TILES, _PROGRAMS = 2, 1024

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
        tiles: tiles that a program processes one after the other.
        groups: programs along the channels.
        pieces: programs for the same channels.
    """

    tile_channels: int
    tile_outer: int
    tile_inner: int
    tiles: int
    groups: int
    pieces: int


def cut_of(layout: Layout) -> Cut:
    """The division of a tensor with this layout; it depends on the shape alone."""
    channels = min(_CHANNELS, triton.next_power_of_2(layout.channels)) if layout.inner == 1 else 1
    inner = min(_TILE, triton.next_power_of_2(layout.inner))
    outer = _TILE // (channels * inner) or 1
    groups = triton.cdiv(layout.channels, channels)
    all_tiles = triton.cdiv(layout.outer, outer) * triton.cdiv(layout.inner, inner)
    tiles = max(_LEAST_TILES, triton.cdiv(all_tiles * groups, _PROGRAMS))
    return Cut(channels, outer, inner, tiles, groups, triton.cdiv(all_tiles, tiles))


def norm_act_forward(
    inputs: NormInputs, running: Running, options: NormOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`sparsekern.kernels.backends.reference.norm_act.norm_act_forward`."""
    x = inputs.x
    layout, dtype = layout_of(x), reference_norm.compute_dtype(x)
    cut, shape, dense = cut_of(layout), _shape(layout), layout.converted(inputs)
    masked, y = _bytes(dense.mask), layout.empty(x)
    mean, var = vector(running.mean, dtype), vector(running.var, dtype)
    with device_of(x):
        if options.training:
            used_mean, used_var = layout.vectors(x)
            parts = _parts(layout, cut, x)
            norm_forward_kernels.moments[cut.groups, cut.pieces](
                dense.x, masked, parts, *shape, **_tile(cut, dtype)
            )
            norm_forward_kernels.merge_moments[(triton.cdiv(layout.channels, _MERGED),)](
                parts, masked, mean, var, used_mean, used_var, *_elements(layout), **_merge(cut, dtype)
            )
        else:
            assert mean is not None and var is not None
            used_mean, used_var = mean.clone(), var.clone()
        norm_forward_kernels.normalise[cut.groups, cut.pieces](
            dense.x,
            dense.residual,
            y,
            dense.weight,
            dense.bias,
            used_mean,
            used_var,
            masked,
            *shape,
            **_tile(cut, dtype),
            **_constants(options),
        )
        if options.training:
            reference_norm.track(running, used_mean, used_var, x.numel() // x.shape[1], options.momentum)
    return layout.returned(y, x), used_mean, used_var


def norm_act_backward(
    grad: Tensor, inputs: NormInputs, moments: Moments, options: NormOptions, counts: ChannelCounts | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """See :func:`sparsekern.kernels.backends.reference.norm_act.norm_act_backward`."""
    x = inputs.x
    layout, dtype = layout_of(x), reference_norm.compute_dtype(x)
    cut, shape, dense = cut_of(layout), _shape(layout), layout.converted(inputs)
    masked, (mean, var) = _bytes(dense.mask), (vector(values, dtype) for values in moments)
    operands = (layout.dense(grad), *dense[:4], mean, var, masked)
    results = grad_x, grad_residual, grad_weight, grad_bias = layout.gradients(inputs)
    parts = _parts(layout, cut, x)
    sums = torch.empty(4, layout.channels, dtype=torch.float64, device=x.device)
    threshold = None if counts is None else counts.threshold
    constants = _tile(cut, dtype) | _constants(options)
    with device_of(x):
        norm_backward_kernels.sum_up[cut.groups, cut.pieces](*operands, threshold, parts, *shape, **constants)
        norm_backward_kernels.merge_sums[(triton.cdiv(layout.channels, _MERGED),)](
            parts,
            masked,
            var,
            grad_weight,
            grad_bias,
            sums,
            *_elements(layout),
            EPS=options.eps,
            **_merge(cut, dtype),
        )
        norm_backward_kernels.descend[cut.groups, cut.pieces](
            *operands, sums, grad_x, grad_residual, *shape, TRAINING=options.training, **constants
        )
        if counts is not None:
            # torch copies the results, so that autograd sees the writes.
            new = [torch.empty_like(counts.threshold), torch.empty_like(counts.activity)]
            norm_backward_kernels.count[(1,)](
                sums,
                dense.weight,
                dense.bias,
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
    return layout.returned_gradients(results, x)


def _constants(options: NormOptions) -> dict[str, Any]:
    """Keyword arguments of kernels that apply the activation."""
    return {"EPS": options.eps, "ACTIVATION": reference_norm.ACTIVATIONS.index(options.activation)}


def _shape(layout: Layout) -> tuple[int, int, int]:
    """Channels, outer size and inner size: the order of the kernels' arguments."""
    return layout.channels, layout.outer, layout.inner


def _elements(layout: Layout) -> tuple[int, int]:
    """The number of channels, and the elements of each."""
    return layout.channels, layout.outer * layout.inner


def _tile(cut: Cut, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of kernels that process tiles."""
    return {
        "tiles": cut.tiles,
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
    return None if mask is None else mask.view(torch.uint8)
