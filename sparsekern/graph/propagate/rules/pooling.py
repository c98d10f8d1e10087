"""Ops over space that treat every channel alone: pooling, resizing, padding, sampling."""

from __future__ import annotations

import numpy as np

from sparsekern.graph.propagate.rules.base import Call, Result, RuleFunction, flags, register_rule
from sparsekern.graph.propagate.slots import STAYS
from sparsekern.graph.propagate.values import Flags, Ids


def over_space(call: Call, spatial: int) -> Result:
    """Resample the last dimensions. The others do not change, and a map of zeros stays zero.

    The padding of a maximum is minus infinity, which is never larger than a zero.

    Args:
        call: the op.
        spatial: the number of dimensions that are resampled.

    Returns:
        The output, or a tuple of several.
    """
    x = next(call.values())
    kept = x.ndim - spatial
    for dim in range(kept, x.ndim):
        call.freeze(x.ids[dim], f"{call.label} resamples it")
    made = []
    for index, (shape, _) in enumerate(call.outputs):
        tail: list[None] = [None] * (len(shape) - kept)
        # The second output holds the indices of a maximum, which are not zero for a map of zeros.
        clears = index > 0
        zero: list[Flags] = [
            None if i is None else flags(z, len(i)) & (not clears)
            for i, z in zip(x.ids[:kept], x.zero, strict=False)
        ]
        made.append(call.make([*x.ids[:kept], *tail], [*zero, *tail], index=index))
    return made[0] if len(made) == 1 else tuple(made)


def _rule(spatial: int) -> RuleFunction:
    return lambda call: over_space(call, spatial)


_OVER_SPACE = (
    "max_pool{}d max_pool{}d_with_indices avg_pool{}d adaptive_avg_pool{}d _adaptive_avg_pool{}d "
    "adaptive_max_pool{}d upsample_nearest{}d _upsample_nearest_exact{}d reflection_pad{}d "
    "replication_pad{}d"
)
for _n in (1, 2, 3):
    register_rule(*_OVER_SPACE.replace("{}", str(_n)).split(), pure=True)(_rule(_n))
register_rule("upsample_linear1d", pure=True)(_rule(1))
register_rule(
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    pure=True,
)(_rule(2))
register_rule("upsample_trilinear3d", pure=True)(_rule(3))


@register_rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d", "grid_sample")
def grid_sampler(call: Call) -> Result:
    grid = call["grid"]
    for ids in grid.ids:
        call.freeze(ids, f"{call.label} reads it as coordinates")
    return over_space(call, call["input"].ndim - 2)


@register_rule("constant_pad_nd", "pad", pure=False)
def pad(call: Call) -> Result:
    """Padding with zeros keeps a map zero. Channels that padding adds always stay."""
    x, widths = call["self"], list(call["pad"])
    mode, value = call.args.get("mode", "constant"), call.args.get("value") or 0
    ids, zero = list(x.ids), list(x.zero)
    for pair in range(len(widths) // 2):
        dim = x.ndim - 1 - pair
        before, after = widths[2 * pair], widths[2 * pair + 1]
        if ids[dim] is None or (before == 0 and after == 0):
            continue
        if mode != "constant" or before < 0 or after < 0:
            call.freeze(ids[dim], f"{call.label} mirrors or crops it")
            ids[dim] = zero[dim] = None
            continue
        ids[dim] = np.pad(ids[dim], (before, after), constant_values=STAYS)
        zero[dim] = np.pad(flags(zero[dim], x.shape[dim]), (before, after), constant_values=True)
    if mode == "constant" and value != 0:
        zero = [None if z is None else np.zeros_like(z) for z in zero]
        return call.make(ids, zero, zero_broken_by=call.label)
    return call.make(ids, zero)


@register_rule("im2col")
def unfold(call: Call) -> Result:
    """From [N, C, H, W] to [N, C * k, L]. Each channel becomes a block of k."""
    x = call["self"]
    channel = x.ndim - 3
    for dim in (channel + 1, channel + 2):
        call.freeze(x.ids[dim], f"{call.label} slides over it")
    times = call.shape()[channel] // x.shape[channel]
    ids: list[Ids] = [*x.ids[:channel], None, None]
    zero: list[Flags] = [*x.zero[:channel], None, None]
    if x.ids[channel] is not None:
        ids[channel] = np.repeat(x.ids[channel], times)
        zero[channel] = np.repeat(flags(x.zero[channel], x.shape[channel]), times)
    return call.make(ids, zero)
