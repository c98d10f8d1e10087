"""Convolutions and transposed convolutions: dense, grouped, depthwise with any multiplier."""

from __future__ import annotations

import math

import numpy as np

from sparsekern.graph.propagate.rules.base import Call, Result, dense, flags, register_rule
from sparsekern.graph.propagate.rules.linear import fixed_bias
from sparsekern.graph.propagate.values import Flags, Ids, Value


def _tie(call: Call, ids: Ids, groups: int, across: bool) -> None:
    """Tie slots inside or across groups.

    Args:
        call: the op.
        ids: slot ids, viewed as [groups, width].
        groups: the number of groups.
        across: True ties equal positions of all groups, False all positions of a group.
    """
    if ids is None or groups == 1:
        return
    table = ids.reshape(groups, -1)
    first = table[:1] if across else table[:, :1]
    call.slots.union(np.broadcast_to(first, table.shape).ravel(), ids, f"{call.label} has equal groups")


def _layout(call: Call) -> tuple[Value, Value, Value | None, int, int]:
    x, weight, bias = call["input"], call["weight"], call["bias"]
    return x, weight, bias, call["groups"], x.ndim - weight.ndim + 1


def _outputs(
    call: Call, x: Value, channel: int, ids: Ids, zero: Flags, kind: str, rows: Ids, bias: Ids
) -> Value:
    """Make the output. Its channels have the given slots; batch and space are untracked."""
    for dim in range(x.ndim):
        if dim != channel:
            call.freeze(x.ids[dim], f"{call.label} reads it as batch or space")
    shape = call.shape()
    out_ids: list[Ids] = [None] * len(shape)
    out_zero: list[Flags] = [None] * len(shape)
    out_ids[channel], out_zero[channel] = ids, zero
    made = call.produce(kind, rows, bias)
    untracked_reason = call["weight"].untracked_reason if rows is None else ""
    return call.make(out_ids, out_zero, origins=made, pure=made, untracked_reason=untracked_reason)


def _row_zero(rows: Ids, row_zero: Flags, bias: Value | None, size: int) -> Flags:
    """Zero flags of the output: it is zero where the weight's rows and the bias are."""
    if rows is None:
        return None
    zero = flags(row_zero, size)
    return zero if bias is None else zero & flags(bias.zero[0], size)


def _count(call: Call, weight: Value, sites: tuple[int, ...]) -> None:
    call.count_macs(math.prod(sites), *(call.size(weight, dim) for dim in range(weight.ndim)))


def _depthwise(call: Call, weight_dim: int) -> Value:
    """A depthwise convolution. An input channel and the outputs made from it alone are one channel."""
    x, weight, bias, groups, channel = _layout(call)
    size = call.shape()[channel]
    multiplier = size // groups
    reason = x.untracked_reason or f"{call.label} reads positions that stay"
    source = np.repeat(dense(x.ids[channel], groups), multiplier)
    rows = weight.ids[0]
    spread = rows if weight_dim == 0 or rows is None else np.repeat(rows, multiplier)
    row_zero = flags(weight.zero[0], weight.shape[0])
    spread_zero = row_zero if weight_dim == 0 else np.repeat(row_zero, multiplier)
    call.unify(source, spread, size, reason)
    if bias is not None:
        call.unify(source, bias.ids[0], size, reason if bias.ids[0] is not None else bias.untracked_reason)
    for producer in x.origins:
        call.records.producers[producer].consumed = True
    zero = _row_zero(spread, spread_zero, bias, size)
    bias_ids = None if bias is None else bias.ids[0]
    return _outputs(call, x, channel, spread, zero, "depthwise", rows, bias_ids)


def _fixed(call: Call) -> bool:
    """Whether weight and bias are computed from parameters alone."""
    bias = call["bias"]
    return bool(call["weight"].static and (bias is None or bias.static))


@register_rule("conv1d", "conv2d", "conv3d")
def convolution(call: Call) -> Result:
    x, weight, bias, groups, channel = _layout(call)
    shape = call.shape()
    _count(call, weight, shape[:channel] + shape[channel + 1 :])
    if not _fixed(call):
        return call.give_up(f"{call.label} has weights computed from activations")
    if groups > 1 and weight.shape[1] == 1:
        return _depthwise(call, 0)
    size, rows = shape[channel], weight.ids[0]
    _contract_groups(call, x, channel, weight, 1, groups)
    if bias is not None:
        call.unify(rows, bias.ids[0], size, fixed_bias(rows, weight, bias))
    _tie(call, rows, groups, across=True)
    zero = _row_zero(rows, weight.zero[0], bias, size)
    bias_ids = None if bias is None else bias.ids[0]
    return _outputs(call, x, channel, rows, zero, "dense", rows, bias_ids)


def _contract_groups(call: Call, x: Value, channel: int, weight: Value, weight_dim: int, groups: int) -> None:
    """Contract the channels of ``x`` with a weight whose columns count positions inside a group."""
    if groups == 1:
        call.contract(x, channel, weight, weight_dim)
        return
    columns = weight.ids[weight_dim]
    size = x.shape[channel]
    if weight_dim == 1 and columns is not None:
        spread: Ids = np.tile(columns, groups)
    else:
        spread = columns
    reason = x.untracked_reason or weight.untracked_reason or f"{call.label} reads positions that stay"
    _tie(call, x.ids[channel], groups, across=True)
    call.unify(x.ids[channel], spread, size, reason)
    if columns is not None:
        call.records.consume(columns)
    call.require_zero(x, channel, weight, spread)


@register_rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(call: Call) -> Result:
    x, weight, bias, groups, channel = _layout(call)
    _count(call, weight, x.shape[:channel] + x.shape[channel + 1 :])
    if not _fixed(call):
        return call.give_up(f"{call.label} has weights computed from activations")
    if groups > 1 and weight.shape[0] == groups:
        return _depthwise(call, 1)
    size = call.shape()[channel]
    _contract_groups(call, x, channel, weight, 0, groups)
    columns = weight.ids[1]
    rows = None if columns is None else np.tile(columns, groups)
    row_zero = np.tile(flags(weight.zero[1], weight.shape[1]), groups)
    if groups > 1 and weight.ids[0] is not None:
        _tie(call, weight.ids[0], groups, across=True)
    if bias is not None:
        single = f"{call.label} makes a single channel in each of its groups"
        reason = single if weight.shape[1] == 1 else fixed_bias(rows, weight, bias)
        call.unify(rows, bias.ids[0], size, reason)
    zero = _row_zero(rows, row_zero, bias, size)
    bias_ids = None if bias is None else bias.ids[0]
    return _outputs(call, x, channel, rows, zero, "dense", columns, bias_ids)
