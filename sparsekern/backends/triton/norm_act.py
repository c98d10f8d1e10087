"""Normalisation with its activation in Triton; compiled and tested in its interpreter, never run on a GPU.

The twin of :mod:`sparsekern.backends.cuda_norm`, in the same passes. Element (o, c, i) of x lies at
``(o * channels + c) * inner + i``. A tile is ``CHANNELS`` times ``OUTER * INNER`` elements, the latter as
one axis; a program takes some tiles of the same channels one after the other (``turns``) and leaves partial
sums in float64, which a small launch merges in the order of the programs. How tensors are cut depends on
shapes alone, and nothing is added atomically.

With ``TRITON_INTERPRET=1``, set before triton is imported, it takes tensors on the CPU.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The arguments of kernels have no types that mypy knows.

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern._counts import ChannelCounts
from sparsekern.backends import reference_norm
from sparsekern.backends._norm_layout import Layout, layout_of, vector

_COMPUTE = {torch.float64: tl.float64, torch.float32: tl.float32}

# Multiplications and additions are rounded one by one, as in the reference.
OPTIONS = {"enable_fp_fusion": False}

# Elements of a tile, and the warps of a program: eight elements for each thread. With sixteen the sums spill.
_TILE, WARPS = 2048, 8

# Channels of a tile where they lie side by side.
_CHANNELS = 128

# Tiles that a program takes at least, and programs of a large tensor, about.
_LEAST_TURNS, _PROGRAMS = 2, 1024

# Partial sums that are read at once where they are merged, and channels.
_PIECES, _MERGED = 64, 16

# Channels that the program which counts reads at once.
_COUNTED = 1024

RELU, RELU6, HARDSWISH, SILU = (
    tl.constexpr(reference_norm.ACTIVATIONS.index(name)) for name in ("relu", "relu6", "hardswish", "silu")
)


class Cut(NamedTuple):
    """How the channels are shared out."""

    tile_channels: int
    tile_outer: int
    tile_inner: int
    turns: int
    groups: int
    pieces: int


def cut_of(layout: Layout) -> Cut:
    """Tiles, how many a program takes one after the other, and how many programs there are."""
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
    """See :func:`sparsekern.backends.reference_norm.norm_act_forward`."""
    layout, dtype = layout_of(x), reference_norm.compute_dtype(x)
    cut, shape = cut_of(layout), _shape(layout)
    x_dense, masked, y = layout.dense(x), _bytes(mask), layout.empty(x)
    mean, var = vector(running_mean, dtype), vector(running_var, dtype)
    with _device_of(x):
        if training:
            used_mean = torch.empty(layout.channels, dtype=dtype, device=x.device)
            used_var = torch.empty_like(used_mean)
            parts = _parts(layout, cut, x)
            _moments[cut.groups, cut.pieces](x_dense, masked, parts, *shape, **_tile(cut, dtype))
            _merge_moments[(triton.cdiv(layout.channels, _MERGED),)](
                parts, masked, mean, var, used_mean, used_var, *_elements(layout), **_merge(cut, dtype)
            )
        else:
            assert mean is not None and var is not None
            used_mean, used_var = mean.clone(), var.clone()
        _normalise[cut.groups, cut.pieces](
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
    """See :func:`sparsekern.backends.reference_norm.norm_act_backward`."""
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
    with _device_of(x):
        _sum_up[cut.groups, cut.pieces](*operands, threshold, parts, *shape, **options)
        _merge_sums[(triton.cdiv(layout.channels, _MERGED),)](
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
        _descend[cut.groups, cut.pieces](
            *operands, sums, grad_x, grad_residual, *shape, TRAINING=training, **options
        )
        if counts is not None:
            # Through torch, so that autograd knows of the writes.
            new = [torch.empty_like(counts.threshold), torch.empty_like(counts.activity)]
            _count[(1,)](
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
    """As the kernels take it."""
    return layout.channels, layout.outer, layout.inner


def _elements(layout: Layout) -> tuple[int, int]:
    """Channels, and the elements of each."""
    return layout.channels, layout.outer * layout.inner


def _tile(cut: Cut, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "turns": cut.turns,
        "CHANNELS": cut.tile_channels,
        "OUTER": cut.tile_outer,
        "INNER": cut.tile_inner,
        "COMPUTE": _COMPUTE[dtype],
        "num_warps": WARPS,
        **OPTIONS,
    }


def _merge(cut: Cut, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "pieces": cut.pieces,
        "CHANNELS": _MERGED,
        "PIECES": _PIECES,
        "COMPUTE": _COMPUTE[dtype],
        **OPTIONS,
    }


def _parts(layout: Layout, cut: Cut, x: Tensor) -> Tensor:
    """Four numbers of every piece of every channel."""
    return torch.empty(4, cut.pieces, layout.channels, dtype=torch.float64, device=x.device)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@triton.jit
def _vector(address, channel, there, missing, COMPUTE: tl.constexpr):
    """Numbers of channels in float64; ``missing`` where there is no such vector."""
    if address is None:
        return tl.full(channel.shape, missing, tl.float64)
    else:
        return tl.load(address + channel, mask=there, other=0).to(tl.float64)


@triton.jit
def _live(mask, channel, there):
    """Which channels there are and are not masked."""
    if mask is None:
        return there
    else:
        return there & (tl.load(mask + channel, mask=there, other=1) == 0)


@triton.jit
def _affine(weight, bias, mean, var, channel, there, EPS: tl.constexpr):
    """gamma / sqrt(var + eps) and what is added, in float64 as in the reference."""
    rstd = 1.0 / tl.sqrt(_vector(var, channel, there, 1, tl.float64) + EPS)
    scale = _vector(weight, channel, there, 1, tl.float64) * rstd
    moved = _vector(mean, channel, there, 0, tl.float64) * scale
    return scale, _vector(bias, channel, there, 0, tl.float64) - moved


@triton.jit
def _here(channels, CHANNELS: tl.constexpr):
    """The channels of this program, and whether there are so many."""
    channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    return channel, channel < channels


@triton.jit
def _places(turn, turns, channel, channels, outer, inner, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Where the elements of a tile lie, and which of them there are in every channel."""
    tile = tl.program_id(1).to(tl.int64) * turns + turn
    across = tl.cdiv(inner, INNER)
    place = tl.arange(0, OUTER * INNER)
    o = tile // across * OUTER + place // INNER
    i = tile % across * INNER + place % INNER
    at = ((o * channels)[None, :] + channel[:, None]) * inner + i[None, :]
    return at, ((o < outer) & (i < inner))[None, :]


@triton.jit
def _sigmoid(z):
    grown = 1 + tl.exp(-z)
    if z.dtype == tl.float32:
        return tl.div_rn(tl.full(z.shape, 1, tl.float32), grown)
    else:
        return 1 / grown


@triton.jit
def _between_0_and_6(z):
    return tl.where(z <= 0, 0, tl.where(z > 6, 6, z))


@triton.jit
def _activated(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == RELU:
        return tl.where(z <= 0, 0, z)
    elif ACTIVATION == RELU6:
        return _between_0_and_6(z)
    elif ACTIVATION == HARDSWISH:
        return z * _between_0_and_6(z + 3) * (1 / 6)
    elif ACTIVATION == SILU:
        return z * _sigmoid(z)
    else:
        return z


@triton.jit
def _gradient_of(grad, z, ACTIVATION: tl.constexpr):
    """The gradient of z from that of what it is activated to."""
    if ACTIVATION == RELU:
        return tl.where(z <= 0, 0, grad)
    elif ACTIVATION == RELU6:
        return tl.where((z <= 0) | (z >= 6), 0, grad)
    elif ACTIVATION == HARDSWISH:
        return tl.where(z <= -3, 0, tl.where(z < 3, grad * (z * (1 / 3) + 0.5), grad))
    elif ACTIVATION == SILU:
        sigmoid = _sigmoid(z)
        return grad * (sigmoid * (1 + z * (1 - sigmoid)))
    else:
        return grad


@triton.jit
def _normal(x, residual, at, live, there, scale, shift, COMPUTE: tl.constexpr):
    """x, and what enters the activation; of masked channels only the residual."""
    value = tl.load(x + at, mask=live, other=0).to(COMPUTE)
    z = tl.where(live, value * scale.to(COMPUTE)[:, None] + shift.to(COMPUTE)[:, None], 0)
    if residual is not None:
        z = z + tl.load(residual + at, mask=there, other=0).to(COMPUTE)
    return value, z


@triton.jit
def _store_part(parts, which: tl.constexpr, value, channel, channels, there):
    at = (tl.program_id(1).to(tl.int64) + which * tl.num_programs(1)) * channels + channel
    tl.store(parts + at, value, mask=there)


@triton.jit
def _moments(
    x,
    mask,
    parts,
    channels,
    outer,
    inner,
    turns,
    CHANNELS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Count, mean and squared distances from it, of a range of positions.

    Every place in the tile adds up about the first element that it reads. That one is among its elements, so
    however far off it is, little is lost where its distance is taken out again.
    """
    channel, there = _here(channels, CHANNELS)
    live = _live(mask, channel, there)[:, None]
    at, inside = _places(0, turns, channel, channels, outer, inner, OUTER, INNER)
    pivot = tl.load(x + at, mask=live & inside, other=0).to(COMPUTE)
    total = tl.zeros((CHANNELS, OUTER * INNER), COMPUTE)
    square = tl.zeros((CHANNELS, OUTER * INNER), COMPUTE)
    number = tl.zeros((CHANNELS, OUTER * INNER), tl.float32)
    for turn in range(turns):
        at, inside = _places(turn, turns, channel, channels, outer, inner, OUTER, INNER)
        value = tl.load(x + at, mask=live & inside, other=0).to(COMPUTE)
        apart = tl.where(live & inside, value - pivot, 0)
        total += apart
        square += apart * apart
        number += (live & inside).to(tl.float32)
    total = total.to(tl.float64)
    number = number.to(tl.float64)
    each = tl.where(number > 0, number, 1)
    means = pivot.to(tl.float64) + total / each
    distances = square.to(tl.float64) - total * total / each
    distances = tl.where(distances < 0, 0, distances)
    count, mean, distance = _merged(number, means, distances)
    _store_part(parts, 0, count, channel, channels, there)
    _store_part(parts, 1, mean, channel, channels, there)
    _store_part(parts, 2, distance, channel, channels, there)


@triton.jit
def _merged(number, means, distances):
    """Counts, means and squared distances of parts ``[channels, parts]``, together."""
    count = tl.sum(number, 1)
    some = tl.where(count > 0, count, 1)
    mean = tl.sum(tl.where(number > 0, number * means, 0), 1) / some
    apart = means - mean[:, None]
    return count, mean, tl.sum(tl.where(number > 0, distances + number * apart * apart, 0), 1)


@triton.jit
def _load_parts(parts, which: tl.constexpr, piece, pieces, channel, channels, there):
    at = (piece.to(tl.int64) + which * pieces)[None, :] * channels + channel[:, None]
    return tl.load(parts + at, mask=there[:, None] & (piece < pieces)[None, :], other=0)


@triton.jit
def _merge_moments(
    parts,
    mask,
    running_mean,
    running_var,
    mean,
    var,
    channels,
    elements,
    pieces,
    CHANNELS: tl.constexpr,
    PIECES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    channel, there = _here(channels, CHANNELS)
    live = _live(mask, channel, there)
    count = tl.zeros((CHANNELS,), tl.float64)
    found = tl.zeros((CHANNELS,), tl.float64)
    distance = tl.zeros((CHANNELS,), tl.float64)
    for first in range(0, pieces, PIECES):
        piece = first + tl.arange(0, PIECES)
        numbers = _load_parts(parts, 0, piece, pieces, channel, channels, there)
        means = _load_parts(parts, 1, piece, pieces, channel, channels, there)
        distances = _load_parts(parts, 2, piece, pieces, channel, channels, there)
        more, other, further = _merged(numbers, means, distances)
        # Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance".
        both = tl.where(count + more > 0, count + more, 1)
        apart = other - found
        distance += further + apart * apart * (count * (more / both))
        found += apart * (more / both)
        count += more
    all_of_them = tl.full((CHANNELS,), elements, tl.float64)
    left = _vector(running_var, channel, there, 1, COMPUTE).to(COMPUTE)
    factor = ((all_of_them - 1) / all_of_them).to(COMPUTE)
    kept = _vector(running_mean, channel, there, 0, COMPUTE)
    tl.store(mean + channel, tl.where(live, found, kept).to(COMPUTE), mask=there)
    some = tl.where(count > 0, count, 1)
    tl.store(var + channel, tl.where(live, (distance / some).to(COMPUTE), left * factor), mask=there)


@triton.jit
def _normalise(
    x,
    residual,
    y,
    weight,
    bias,
    mean,
    var,
    mask,
    channels,
    outer,
    inner,
    turns,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    channel, there = _here(channels, CHANNELS)
    live = _live(mask, channel, there)[:, None]
    scale, shift = _affine(weight, bias, mean, var, channel, there, EPS)
    for turn in range(turns):
        at, inside = _places(turn, turns, channel, channels, outer, inner, OUTER, INNER)
        inside = inside & there[:, None]
        _, z = _normal(x, residual, at, live & inside, inside, scale, shift, COMPUTE)
        tl.store(y + at, _activated(z, ACTIVATION).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _sum_up(
    grad,
    x,
    residual,
    weight,
    bias,
    mean,
    var,
    mask,
    threshold,
    parts,
    channels,
    outer,
    inner,
    turns,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Sums of dz, dz * (x - mean) and dz * dz, and how many |dz| exceed the threshold."""
    channel, there = _here(channels, CHANNELS)
    live = _live(mask, channel, there)[:, None]
    scale, shift = _affine(weight, bias, mean, var, channel, there, EPS)
    middle = _vector(mean, channel, there, 0, COMPUTE).to(COMPUTE)[:, None]
    least = _vector(threshold, channel, there, float("inf"), COMPUTE).to(COMPUTE)[:, None]
    total = tl.zeros((CHANNELS, OUTER * INNER), COMPUTE)
    dot = tl.zeros((CHANNELS, OUTER * INNER), COMPUTE)
    square = tl.zeros((CHANNELS, OUTER * INNER), COMPUTE)
    number = tl.zeros((CHANNELS, OUTER * INNER), tl.int32)
    for turn in range(turns):
        at, inside = _places(turn, turns, channel, channels, outer, inner, OUTER, INNER)
        inside = inside & live
        value, z = _normal(x, residual, at, inside, inside, scale, shift, COMPUTE)
        dz = _gradient_of(tl.load(grad + at, mask=inside, other=0).to(COMPUTE), z, ACTIVATION)
        total += dz
        dot += tl.where(inside, dz * (value - middle), 0)
        square += dz * dz
        number += (tl.abs(dz) > least).to(tl.int32)
    _store_part(parts, 0, tl.sum(total.to(tl.float64), 1), channel, channels, there)
    _store_part(parts, 1, tl.sum(dot.to(tl.float64), 1), channel, channels, there)
    _store_part(parts, 2, tl.sum(square.to(tl.float64), 1), channel, channels, there)
    _store_part(parts, 3, tl.sum(number.to(tl.float64), 1), channel, channels, there)


@triton.jit
def _sum_of_parts(parts, which: tl.constexpr, pieces, channel, channels, there, PIECES: tl.constexpr):
    found = tl.zeros(channel.shape, tl.float64)
    for first in range(0, pieces, PIECES):
        piece = first + tl.arange(0, PIECES)
        found += tl.sum(_load_parts(parts, which, piece, pieces, channel, channels, there), 1)
    return found


@triton.jit
def _merge_sums(
    parts,
    mask,
    var,
    grad_weight,
    grad_bias,
    sums,
    channels,
    elements,
    pieces,
    EPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIECES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    channel, there = _here(channels, CHANNELS)
    rstd = 1.0 / tl.sqrt(_vector(var, channel, there, 1, COMPUTE) + EPS)
    for which in tl.static_range(4):
        found = _sum_of_parts(parts, which, pieces, channel, channels, there, PIECES)
        tl.store(sums + which * channels + channel, found, mask=there)
        if which == 0:
            tl.store(grad_bias + channel, found.to(COMPUTE), mask=there)
        if which == 1:
            tl.store(grad_weight + channel, (found * rstd).to(COMPUTE), mask=there)


@triton.jit
def _descend(
    grad,
    x,
    residual,
    weight,
    bias,
    mean,
    var,
    mask,
    sums,
    grad_x,
    grad_residual,
    channels,
    outer,
    inner,
    turns,
    TRAINING: tl.constexpr,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The gradients of x and the residual."""
    channel, there = _here(channels, CHANNELS)
    live = _live(mask, channel, there)[:, None]
    scale, shift = _affine(weight, bias, mean, var, channel, there, EPS)
    middle = _vector(mean, channel, there, 0, COMPUTE).to(COMPUTE)[:, None]
    elements = tl.full((CHANNELS,), outer, tl.float64) * inner
    of_bias = tl.load(sums + channel, mask=there, other=0)
    dot = tl.load(sums + channels + channel, mask=there, other=0)
    spread = _vector(var, channel, there, 1, COMPUTE) + EPS
    slope = (-scale * (dot / elements) / spread).to(COMPUTE)[:, None]
    offset = (-scale * (of_bias / elements)).to(COMPUTE)[:, None]
    for turn in range(turns):
        at, inside = _places(turn, turns, channel, channels, outer, inner, OUTER, INNER)
        inside = inside & there[:, None]
        value, z = _normal(x, residual, at, live & inside, inside, scale, shift, COMPUTE)
        read = inside if residual is not None else inside & live
        dz = _gradient_of(tl.load(grad + at, mask=read, other=0).to(COMPUTE), z, ACTIVATION)
        found = dz * scale.to(COMPUTE)[:, None]
        if TRAINING:
            found = found + ((value - middle) * slope + offset)
        tl.store(grad_x + at, tl.where(live, found, 0).to(grad_x.dtype.element_ty), mask=inside)
        if residual is not None:
            tl.store(grad_residual + at, dz.to(grad_residual.dtype.element_ty), mask=inside)


@triton.jit
def _counted(sums, weight, bias, mask, first, channels, BLOCK: tl.constexpr):
    """Channels, which of them count, the squares of their norms and of their gradients."""
    channel = first + tl.arange(0, BLOCK)
    there = channel < channels
    gamma = _vector(weight, channel, there, 1, tl.float64)
    beta = _vector(bias, channel, there, 0, tl.float64)
    norm_sq = gamma * gamma + beta * beta
    grad_sq = tl.load(sums + 2 * channels + channel, mask=there, other=0)
    finite = (grad_sq - grad_sq == 0) & (norm_sq - norm_sq == 0)
    return channel, there, _live(mask, channel, there) & finite, norm_sq, grad_sq


@triton.jit
def _count(
    sums,
    weight,
    bias,
    mask,
    threshold,
    activity,
    new_threshold,
    new_activity,
    channels,
    elements,
    TAU: tl.constexpr,
    DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    of_channel = tl.full((BLOCK,), elements, tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    number = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, channels, BLOCK):
        _, _, counts, norm_sq, grad_sq = _counted(sums, weight, bias, mask, first, channels, BLOCK)
        squares += tl.where(counts, grad_sq * norm_sq, 0)
        number += counts.to(tl.float64)
    # With nothing counted there is nothing to store.
    rms = tl.sqrt(tl.sum(squares, 0) / (tl.maximum(tl.sum(number, 0), 1) * of_channel))
    for first in range(0, channels, BLOCK):
        channel, there, counts, norm_sq, _ = _counted(sums, weight, bias, mask, first, channels, BLOCK)
        exceeding = tl.load(sums + 3 * channels + channel, mask=there, other=0)
        before = tl.load(activity + channel, mask=there, other=0)
        blended = before * DECAY + (exceeding / of_channel).to(tl.float32) * (1 - DECAY)
        tl.store(new_activity + channel, tl.where(counts, blended, before), mask=there)
        reached = TAU * rms / tl.sqrt(tl.where(norm_sq == 0, 1, norm_sq))
        reached = tl.where(norm_sq == 0, float("inf"), reached).to(tl.float32)
        old = tl.load(threshold + channel, mask=there, other=0)
        tl.store(new_threshold + channel, tl.where(counts, reached, old), mask=there)
