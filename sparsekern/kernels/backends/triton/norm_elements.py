"""Functions of the normalisation kernels for elements, channels and partial sums.

All normalisation kernels name their arguments and values alike:

* ``channels, outer, inner``: the sizes of ``x``; ``tiles``: number of tiles that a program processes.
* ``parts``: float64 ``[4, pieces, channels]``, partial sums; ``elements``: elements per channel.
* ``channel``: indices of a program's channels; ``there``: whether they exist; ``live``: and are not masked.
* ``at``: offsets of a tile's elements; ``inside``: whether they exist.
* ``CHANNELS, OUTER, INNER``: the size of a tile; ``COMPUTE``: type of the arithmetic on elements.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The arguments of kernels have no types that mypy knows.

from __future__ import annotations

import triton
import triton.language as tl

from sparsekern.kernels.backends.reference import norm_act as reference_norm

RELU, RELU6, HARDSWISH, SILU = (
    tl.constexpr(reference_norm.ACTIVATIONS.index(name)) for name in ("relu", "relu6", "hardswish", "silu")
)

OF_TILES = ("outer", "tiles")
"""Arguments of the kernels over tiles that Triton does not compile variants for: no access is wider by them.
``channels`` and ``inner`` stay, because the accesses have 16 bytes where these are multiples of 16."""

OF_CHANNELS = ("channels", "elements", "pieces")
"""The same for the kernels that merge and count. A shrink changes the numbers of channels of all layers."""


@triton.jit
def vector(address, channel, there, missing, COMPUTE: tl.constexpr):
    """One float64 value per channel; ``missing`` if the vector ``address`` is None."""
    if address is None:
        return tl.full(channel.shape, missing, tl.float64)
    else:
        return tl.load(address + channel, mask=there, other=0).to(tl.float64)


@triton.jit
def live_of(mask, channel, there):
    """Whether channels exist and are not masked."""
    if mask is None:
        return there
    else:
        return there & (tl.load(mask + channel, mask=there, other=1) == 0)


@triton.jit
def affine(weight, bias, mean, var, channel, there, EPS: tl.constexpr):
    """Scale gamma / sqrt(var + eps) and shift beta - mean * scale, in float64 as in the reference."""
    rstd = 1.0 / tl.sqrt(vector(var, channel, there, 1, tl.float64) + EPS)
    scale = vector(weight, channel, there, 1, tl.float64) * rstd
    moved = vector(mean, channel, there, 0, tl.float64) * scale
    return scale, vector(bias, channel, there, 0, tl.float64) - moved


@triton.jit
def channels_here(channels, CHANNELS: tl.constexpr):
    """The channel indices of this program, and whether each is less than ``channels``."""
    channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    return channel, channel < channels


@triton.jit
def places(tile, tiles, channel, channels, outer, inner, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Offsets of a tile's elements ``[channels, OUTER * INNER]``, and whether they exist ``[1, ...]``."""
    first = tl.program_id(1).to(tl.int64) * tiles
    across = tl.cdiv(inner, INNER)
    place = tl.arange(0, OUTER * INNER)
    o = (first + tile) // across * OUTER + place // INNER
    i = (first + tile) % across * INNER + place % INNER
    at = ((o * channels)[None, :] + channel[:, None]) * inner + i[None, :]
    return at, ((o < outer) & (i < inner))[None, :]


@triton.jit
def _sigmoid(z):
    """1 / (1 + exp(-z)), with a correctly rounded division."""
    grown = 1 + tl.exp(-z)
    if z.dtype == tl.float32:
        return tl.div_rn(tl.full(z.shape, 1, tl.float32), grown)
    else:
        return 1 / grown


@triton.jit
def _between_0_and_6(z):
    """``z`` limited to [0, 6]; NaN stays NaN."""
    return tl.where(z <= 0, 0, tl.where(z > 6, 6, z))


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """The activation of ``z``."""
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
def gradient_of(grad, z, ACTIVATION: tl.constexpr):
    """The gradient of ``z`` from ``grad``, the gradient of the activation's result."""
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
def normal(x, residual, at, live, there, scale, shift, COMPUTE: tl.constexpr):
    """``x`` and the input of the activation, which is the residual alone in masked channels."""
    value = tl.load(x + at, mask=live, other=0).to(COMPUTE)
    z = tl.where(live, value * scale.to(COMPUTE)[:, None] + shift.to(COMPUTE)[:, None], 0)
    if residual is not None:
        z = z + tl.load(residual + at, mask=there, other=0).to(COMPUTE)
    return value, z


@triton.jit
def store_part(parts, which: tl.constexpr, value, channel, channels, there):
    """Store this program's partial sum ``which`` of channels."""
    at = (tl.program_id(1).to(tl.int64) + which * tl.num_programs(1)) * channels + channel
    tl.store(parts + at, value, mask=there)


@triton.jit
def load_parts(parts, which: tl.constexpr, piece, pieces, channel, channels, there):
    """Load partial sums ``[channels, pieces]`` number ``which``; 0 where there are none."""
    at = (piece.to(tl.int64) + which * pieces)[None, :] * channels + channel[:, None]
    return tl.load(parts + at, mask=there[:, None] & (piece < pieces)[None, :], other=0)
