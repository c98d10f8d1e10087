"""The forward pass of a normalisation: mean and variance of channels, normalisation, activation."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The arguments of kernels have no types that mypy knows.

from __future__ import annotations

import triton
import triton.language as tl

from sparsekern.kernels.backends.triton.norm_elements import (
    OF_CHANNELS,
    OF_TILES,
    activated,
    affine,
    channels_here,
    live_of,
    load_parts,
    normal,
    places,
    store_part,
    vector,
)


@triton.jit(do_not_specialize=OF_TILES)
def moments(
    x,
    mask,
    parts,
    channels,
    outer,
    inner,
    tiles,
    CHANNELS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Store the count, the mean and the sum of squared distances from it, for a program's tiles.

    Every position in the tile sums differences from the first element that it reads (the pivot). The pivot is
    one of the summed elements, so the correction at the end loses little precision, however large it is.
    """
    channel, there = channels_here(channels, CHANNELS)
    live = live_of(mask, channel, there)[:, None]
    at, inside = places(0, tiles, channel, channels, outer, inner, OUTER, INNER)
    pivot = tl.load(x + at, mask=live & inside, other=0).to(COMPUTE)
    total = tl.zeros((CHANNELS, OUTER * INNER), COMPUTE)
    square = tl.zeros((CHANNELS, OUTER * INNER), COMPUTE)
    number = tl.zeros((CHANNELS, OUTER * INNER), tl.float32)
    for tile in range(tiles):
        at, inside = places(tile, tiles, channel, channels, outer, inner, OUTER, INNER)
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
    store_part(parts, 0, count, channel, channels, there)
    store_part(parts, 1, mean, channel, channels, there)
    store_part(parts, 2, distance, channel, channels, there)


@triton.jit
def _merged(number, means, distances):
    """Merge counts, means and squared distances of parts ``[channels, parts]`` into ``[channels]``."""
    count = tl.sum(number, 1)
    some = tl.where(count > 0, count, 1)
    mean = tl.sum(tl.where(number > 0, number * means, 0), 1) / some
    apart = means - mean[:, None]
    return count, mean, tl.sum(tl.where(number > 0, distances + number * apart * apart, 0), 1)


@triton.jit(do_not_specialize=OF_CHANNELS)
def merge_moments(
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
    """Merge the partial moments of channels, and store the mean and the biased variance."""
    channel, there = channels_here(channels, CHANNELS)
    live = live_of(mask, channel, there)
    count = tl.zeros((CHANNELS,), tl.float64)
    found = tl.zeros((CHANNELS,), tl.float64)
    distance = tl.zeros((CHANNELS,), tl.float64)
    for first in range(0, pieces, PIECES):
        piece = first + tl.arange(0, PIECES)
        numbers = load_parts(parts, 0, piece, pieces, channel, channels, there)
        means = load_parts(parts, 1, piece, pieces, channel, channels, there)
        distances = load_parts(parts, 2, piece, pieces, channel, channels, there)
        more, other, further = _merged(numbers, means, distances)
        # Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance".
        both = tl.where(count + more > 0, count + more, 1)
        apart = other - found
        distance += further + apart * apart * (count * (more / both))
        found += apart * (more / both)
        count += more
    all_of_them = tl.full((CHANNELS,), elements, tl.float64)
    left = vector(running_var, channel, there, 1, COMPUTE).to(COMPUTE)
    factor = ((all_of_them - 1) / all_of_them).to(COMPUTE)
    kept = vector(running_mean, channel, there, 0, COMPUTE)
    tl.store(mean + channel, tl.where(live, found, kept).to(COMPUTE), mask=there)
    some = tl.where(count > 0, count, 1)
    tl.store(var + channel, tl.where(live, (distance / some).to(COMPUTE), left * factor), mask=there)


@triton.jit(do_not_specialize=OF_TILES)
def normalise(
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
    tiles,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Store the activated result of the normalisation."""
    channel, there = channels_here(channels, CHANNELS)
    live = live_of(mask, channel, there)[:, None]
    scale, shift = affine(weight, bias, mean, var, channel, there, EPS)
    for tile in range(tiles):
        at, inside = places(tile, tiles, channel, channels, outer, inner, OUTER, INNER)
        inside = inside & there[:, None]
        _, z = normal(x, residual, at, live & inside, inside, scale, shift, COMPUTE)
        tl.store(y + at, activated(z, ACTIVATION).to(y.dtype.element_ty), mask=inside)
