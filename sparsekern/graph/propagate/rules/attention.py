"""Scaled dot-product attention, from which whole heads can be removed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sparsekern.graph.propagate.rules.base import Call, Factor, Result, flags, register_rule
from sparsekern.graph.propagate.values import Flags, Ids, Value


@register_rule("scaled_dot_product_attention")
def attention(call: Call) -> Result:
    """Attention over operands of shape [..., heads, positions, size].

    The scale depends on the size of queries and keys, and the softmax on the positions. Heads are
    independent, and a head whose values are zero gives zeros.
    """
    query, key, value, mask = call["query"], call["key"], call["value"], call["attn_mask"]
    fixed = [(query, query.ndim - 1), (key, key.ndim - 1), (key, key.ndim - 2), (value, value.ndim - 2)]
    for operand, dim in fixed:
        call.freeze(operand.ids[dim], f"{call.label} scales and normalises over it")
    call.freeze(query.ids[-2], f"{call.label} reads it as positions")
    batch = query.ndim - 2
    if call.args.get("enable_gqa") and key.shape[-3] != query.shape[-3]:
        key, value = (_shared_heads(v, query.shape[-3] // v.shape[-3]) for v in (key, value))
    ids: list[Ids] = []
    zero: list[Flags] = []
    for dim in range(batch):
        own, flag = _paired(call, [query, key, value], dim)
        _masked(call, mask, dim - query.ndim, own, len(own) if own is not None else 0)
        ids.append(own)
        zero.append(flag)
    for dim in (-1, -2):
        if mask is not None and mask.ndim >= -dim:
            call.freeze(mask.ids[dim], f"{call.label} masks positions with it")
    heads: list[Factor] = [query.shape[d] if i is None else i for d, i in enumerate(ids)]
    pairs: list[Factor] = [*heads, query.shape[-2], key.shape[-2]]
    call.count_macs(1, *pairs, query.shape[-1])
    call.count_macs(1, *pairs, call.size(value, value.ndim - 1))
    return call.make([*ids, None, value.ids[-1]], [*zero, None, value.zero[-1]], origins=value.origins)


def _shared_heads(value: Value, times: int) -> Value:
    """Keys or values, repeated so that every head of the queries has its own."""
    dim = value.ndim - 3
    if value.shape[dim] == 1:
        # All heads share this one; it is broadcast to however many there are.
        return value
    ids, zero = list(value.ids), list(value.zero)
    own = ids[dim]
    if own is not None:
        ids[dim] = np.repeat(own, times)
        zero[dim] = np.repeat(flags(zero[dim], value.shape[dim]), times)
    shape = (*value.shape[:dim], value.shape[dim] * times, *value.shape[dim + 1 :])
    return replace(value, shape=shape, ids=tuple(ids), zero=tuple(zero))


def _paired(call: Call, operands: list[Value], dim: int) -> tuple[Ids, Flags]:
    """Ids of a leading dimension, tied over all operands, and its zero flags, those of the last operand."""
    wide = [v for v in operands if v.shape[dim] > 1]
    tracked = [ids for v in wide if (ids := v.ids[dim]) is not None]
    if not tracked:
        return None, None
    size = len(tracked[0])
    untracked_reason = next(
        (v.untracked_reason for v in wide if v.ids[dim] is None and v.untracked_reason), ""
    )
    for value in wide:
        reason = untracked_reason or f"{call.label} pairs it with positions that stay"
        call.unify(tracked[0], value.ids[dim], size, reason)
    values = operands[-1]
    return tracked[0], flags(values.zero[dim] if values.shape[dim] > 1 else None, size)


def _masked(call: Call, mask: Value | None, dim: int, ids: Ids, size: int) -> None:
    """Tie a leading dimension of a mask that is larger than 1 to the heads or batch."""
    if mask is None or mask.ndim < -dim or mask.shape[dim] == 1:
        return
    if ids is None:
        call.freeze(mask.ids[dim], f"{call.label} masks heads that stay with it")
    else:
        reason = mask.untracked_reason or f"{call.label} masks it by a tensor of fixed size"
        call.unify(ids, mask.ids[dim], size, reason)
