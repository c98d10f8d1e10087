"""The backward pass of a normalisation with its activation, and its counts of gradients."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The arguments of kernels have no types that mypy knows.

from __future__ import annotations

import triton
import triton.language as tl

from sparsekern.kernels.backends.triton.norm_elements import (
    OF_CHANNELS,
    OF_TILES,
    affine,
    channels_here,
    gradient_of,
    live_of,
    load_parts,
    normal,
    places,
    store_part,
    vector,
)


@triton.jit(do_not_specialize=OF_TILES)
def sum_up(
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
    tiles,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Store the sums of dz, dz * (x - mean) and dz * dz, and the number of |dz| above the threshold."""
    channel, there = channels_here(channels, CHANNELS)
    live = live_of(mask, channel, there)[:, None]
    scale, shift = affine(weight, bias, mean, var, channel, there, EPS)
    middle = vector(mean, channel, there, 0, COMPUTE).to(COMPUTE)[:, None]
    least = vector(threshold, channel, there, float("inf"), COMPUTE).to(COMPUTE)[:, None]
    total = tl.zeros((CHANNELS, OUTER * INNER), COMPUTE)
    dot = tl.zeros((CHANNELS, OUTER * INNER), COMPUTE)
    square = tl.zeros((CHANNELS, OUTER * INNER), COMPUTE)
    number = tl.zeros((CHANNELS, OUTER * INNER), tl.int32)
    for tile in range(tiles):
        at, inside = places(tile, tiles, channel, channels, outer, inner, OUTER, INNER)
        inside = inside & live
        value, z = normal(x, residual, at, inside, inside, scale, shift, COMPUTE)
        dz = gradient_of(tl.load(grad + at, mask=inside, other=0).to(COMPUTE), z, ACTIVATION)
        total += dz
        dot += tl.where(inside, dz * (value - middle), 0)
        square += dz * dz
        number += (tl.abs(dz) > least).to(tl.int32)
    store_part(parts, 0, tl.sum(total.to(tl.float64), 1), channel, channels, there)
    store_part(parts, 1, tl.sum(dot.to(tl.float64), 1), channel, channels, there)
    store_part(parts, 2, tl.sum(square.to(tl.float64), 1), channel, channels, there)
    store_part(parts, 3, tl.sum(number.to(tl.float64), 1), channel, channels, there)


@triton.jit
def _sum_of_parts(parts, which: tl.constexpr, pieces, channel, channels, there, PIECES: tl.constexpr):
    """Add up the partial sums ``which`` of channels, in float64."""
    found = tl.zeros((channel.shape[0], PIECES), tl.float64)
    for first in range(0, pieces, PIECES):
        piece = first + tl.arange(0, PIECES)
        found += load_parts(parts, which, piece, pieces, channel, channels, there)
    return tl.sum(found, 1)


@triton.jit(do_not_specialize=OF_CHANNELS)
def merge_sums(
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
    """Add up the partial sums and store the gradients of weight and bias."""
    channel, there = channels_here(channels, CHANNELS)
    rstd = 1.0 / tl.sqrt(vector(var, channel, there, 1, COMPUTE) + EPS)
    for which in tl.static_range(4):
        found = _sum_of_parts(parts, which, pieces, channel, channels, there, PIECES)
        tl.store(sums + which * channels + channel, found, mask=there)
        if which == 0:
            tl.store(grad_bias + channel, found.to(COMPUTE), mask=there)
        if which == 1:
            # The variance of a masked channel is arbitrary, so its gradient is set to 0.
            of_weight = tl.where(live_of(mask, channel, there), found * rstd, 0)
            tl.store(grad_weight + channel, of_weight.to(COMPUTE), mask=there)


@triton.jit(do_not_specialize=OF_TILES)
def descend(
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
    tiles,
    TRAINING: tl.constexpr,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Store the gradients of ``x`` and the residual."""
    channel, there = channels_here(channels, CHANNELS)
    live = live_of(mask, channel, there)[:, None]
    scale, shift = affine(weight, bias, mean, var, channel, there, EPS)
    middle = vector(mean, channel, there, 0, COMPUTE).to(COMPUTE)[:, None]
    elements = tl.full((CHANNELS,), outer, tl.float64) * inner
    of_bias = tl.load(sums + channel, mask=there, other=0)
    dot = tl.load(sums + channels + channel, mask=there, other=0)
    spread = vector(var, channel, there, 1, COMPUTE) + EPS
    slope = (-scale * (dot / elements) / spread).to(COMPUTE)[:, None]
    offset = (-scale * (of_bias / elements)).to(COMPUTE)[:, None]
    for tile in range(tiles):
        at, inside = places(tile, tiles, channel, channels, outer, inner, OUTER, INNER)
        inside = inside & there[:, None]
        value, z = normal(x, residual, at, live & inside, inside, scale, shift, COMPUTE)
        read = inside if residual is not None else inside & live
        dz = gradient_of(tl.load(grad + at, mask=read, other=0).to(COMPUTE), z, ACTIVATION)
        found = dz * scale.to(COMPUTE)[:, None]
        if TRAINING:
            found = found + ((value - middle) * slope + offset)
        tl.store(grad_x + at, tl.where(live, found, 0).to(grad_x.dtype.element_ty), mask=inside)
        if residual is not None:
            tl.store(grad_residual + at, dz.to(grad_residual.dtype.element_ty), mask=inside)


@triton.jit
def _counted(sums, weight, bias, mask, first, channels, BLOCK: tl.constexpr):
    """Channels, whether they exist, whether they count, squared parameter norms and sums of dz * dz."""
    channel = first + tl.arange(0, BLOCK)
    there = channel < channels
    gamma = vector(weight, channel, there, 1, tl.float64)
    beta = vector(bias, channel, there, 0, tl.float64)
    norm_sq = gamma * gamma + beta * beta
    grad_sq = tl.load(sums + 2 * channels + channel, mask=there, other=0)
    finite = (grad_sq - grad_sq == 0) & (norm_sq - norm_sq == 0)
    return channel, there, live_of(mask, channel, there) & finite, norm_sq, grad_sq


@triton.jit(do_not_specialize=OF_CHANNELS)
def count(
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
    """Store the new activities and thresholds of all channels, in one program."""
    of_channel = tl.full((BLOCK,), elements, tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    number = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, channels, BLOCK):
        _, _, counts, norm_sq, grad_sq = _counted(sums, weight, bias, mask, first, channels, BLOCK)
        squares += tl.where(counts, grad_sq * norm_sq, 0)
        number += counts.to(tl.float64)
    # If no channel counts, nothing changes; the maximum only avoids a division by 0.
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
