"""Linear layers, matrix products, attention and embeddings."""

from __future__ import annotations

import numpy as np

from ..values import Flags, Ids, Value
from .base import Call, Result, flags, register_rule


@register_rule("linear")
def linear(call: Call) -> Result:
    x, weight, bias = call["input"], call["weight"], call["bias"]
    call.count_macs(
        1,
        *(call.size(x, dim) for dim in range(x.ndim - 1)),
        *(call.size(weight, dim) for dim in range(weight.ndim)),
    )
    if not weight.static or (bias is not None and not bias.static):
        return call.give_up(f"{call.label} has weights computed from activations")
    if weight.ndim != 2:
        return call.give_up(f"{call.label} has a weight of {weight.ndim} dimensions")
    call.contract(x, x.ndim - 1, weight, 1)
    rows, size = weight.ids[0], weight.shape[0]
    if bias is not None:
        call.unify(rows, bias.ids[0], size, bias.why or weight.why or "tied to a fixed bias")
    zero: Flags = None
    if rows is not None:
        zero = flags(weight.zero[0], size)
        zero = zero if bias is None else zero & flags(bias.zero[0], size)
    made = call.produce("dense", rows, None if bias is None else bias.ids[0])
    leading = x.ids[:-1]
    kept = [
        None if i is None else flags(z, len(i)) & (bias is None)
        for i, z in zip(leading, x.zero, strict=False)
    ]
    origins = made | (x.origins if bias is None else frozenset())
    return call.make([*leading, rows], [*kept, zero], origins=origins, pure=made)


def _product(call: Call, left: Value, right: Value, batch: int) -> Result:
    """[..., m, k] times [..., k, n]: the last two dimensions of both, ``batch`` before them."""
    m, k = left.ndim - 2, left.ndim - 1
    size = left.shape[k]
    reason = left.why or right.why or f"{call.label} reads positions that stay"
    call.unify(left.ids[k], right.ids[-2], size, reason)
    vanishes = flags(left.zero[k], size) | flags(right.zero[-2], size)
    ids = left.ids[k] if left.ids[k] is not None else right.ids[-2]
    if ids is not None:
        _consume(call, left, right, ids)
        by = left.cleared or right.cleared
        reason = f"{call.label} sums over it not as zero" + (f" after {by}" if by else "")
        call.freeze(ids[~vanishes], reason)
    made: frozenset[int] = frozenset()
    if right.static and not left.static:
        made = call.produce("dense", right.ids[-1], None)
    elif left.static and not right.static:
        made = call.produce("dense", left.ids[m], None)
    out_ids, out_zero = _batch_dims(call, left, right, batch)
    out_ids += [left.ids[m], right.ids[-1]]
    out_zero += [left.zero[m], right.zero[-1]]
    call.count_macs(
        1,
        *(call.size(left if left.shape[d] > 1 else right, d) for d in range(batch)),
        call.size(left, m),
        call.size(left, k) if left.ids[k] is not None else call.size(right, right.ndim - 2),
        call.size(right, right.ndim - 1),
    )
    return call.make(out_ids, out_zero, origins=left.origins | right.origins | made)


def _consume(call: Call, left: Value, right: Value, ids: np.ndarray) -> None:
    for value in (left, right):
        for producer in value.origins:
            call.records.producers[producer].consumed = True
    if right.static and not left.static and right.ids[-2] is not None:
        call.records.consume(right.ids[-2])
    if left.static and not right.static and left.ids[-1] is not None:
        call.records.consume(left.ids[-1])


def _batch_dims(call: Call, left: Value, right: Value, batch: int) -> tuple[list[Ids], list[Flags]]:
    """Leading dimensions, which both operands have: coupled where neither is of size 1."""
    ids: list[Ids] = []
    zero: list[Flags] = []
    for dim in range(batch):
        wide = [v for v in (left, right) if v.shape[dim] > 1 and v.ids[dim] is not None]
        both = left.shape[dim] > 1 and right.shape[dim] > 1
        if both:
            reason = f"{call.label} pairs it with positions that stay"
            call.unify(left.ids[dim], right.ids[dim], left.shape[dim], reason)
        ids.append(wide[0].ids[dim] if wide else None)
        flag: Flags = None
        for value in wide:
            flag = value.zero[dim] if flag is None else flag | flags(value.zero[dim], len(flag))
        zero.append(flag)
    return ids, zero


def _padded(value: Value, ndim: int) -> Value:
    """The value with leading dimensions of size 1, ``ndim`` in all."""
    extra = ndim - value.ndim
    if extra == 0:
        return value
    none: tuple[None, ...] = (None,) * extra
    return Value(
        (1,) * extra + value.shape,
        none + value.ids,
        none + value.zero,
        value.itemsize,
        value.why,
        value.cleared,
        value.origins,
        value.pure,
        value.storage,
        value.static,
    )


@register_rule("matmul", "bmm", "mm")
def matmul(call: Call) -> Result:
    left, right = call["self"], call["other" if call.name == "matmul" else "mat2"]
    if min(left.ndim, right.ndim) < 2:
        return call.give_up(f"{call.label} takes a vector")
    ndim = max(left.ndim, right.ndim)
    return _product(call, _padded(left, ndim), _padded(right, ndim), ndim - 2)


@register_rule("scaled_dot_product_attention")
def attention(call: Call) -> Result:
    """The scale and the softmax depend on queries and keys; only the values' width is free."""
    query, key, value, mask = call["query"], call["key"], call["value"], call["attn_mask"]
    fixed = [(query, query.ndim - 1), (key, key.ndim - 1), (key, key.ndim - 2), (value, value.ndim - 2)]
    for operand, dim in fixed:
        call.freeze(operand.ids[dim], f"{call.label} scales and normalises over it")
    if mask is not None:
        for ids in mask.ids:
            call.freeze(ids, f"{call.label} masks with it")
    for operand in (query, key, value):
        for dim in range(operand.ndim - 2):
            call.freeze(operand.ids[dim], f"{call.label} treats it as a head or the batch")
    call.freeze(query.ids[-2], f"{call.label} reads it as positions")
    none = [None] * (value.ndim - 1)
    batch = [query.shape[d] for d in range(query.ndim - 2)]
    pairs = [*batch, query.shape[-2], key.shape[-2]]
    call.count_macs(1, *pairs, query.shape[-1])
    call.count_macs(1, *pairs, call.size(value, value.ndim - 1))
    return call.make([*none, value.ids[-1]], [*none, value.zero[-1]], origins=value.origins)


@register_rule("embedding")
def embedding(call: Call) -> Result:
    weight = call["weight"]
    call.freeze(weight.ids[0], f"{call.label} looks up rows by number")
    none = [None] * (len(call.shape()) - 1)
    made = call.produce("embedding", weight.ids[1], None)
    return call.make([*none, weight.ids[1]], [*none, weight.zero[1]], origins=made, pure=made)


@register_rule("einsum")
def einsum(call: Call) -> Result:
    """Two operands, plain letters, each at most once in an operand."""
    operands = call["tensors"]
    inputs, _, output = call["equation"].replace(" ", "").partition("->")
    letters = inputs.split(",")
    plain = "." not in inputs and output and all(len(set(w)) == len(w) for w in letters)
    if not plain or len(operands) != 2 or operands[0].static == operands[1].static:
        return call.give_up(f"{call.label}({call['equation']}) is not followed")
    table = _letters(call, operands, letters)
    for value, word in zip(operands, letters, strict=True):
        for producer in value.origins:
            call.records.producers[producer].consumed = True
        if value.static:
            for dim, letter in enumerate(word):
                own = value.ids[dim]
                if own is not None and letter not in output:
                    call.records.consume(own)
                elif own is not None and letter not in letters[operands.index(value) ^ 1]:
                    call.produce("dense", own, None)
    for letter, (ids, zero, _) in table.items():
        if letter not in output and ids is not None:
            call.freeze(ids[~flags(zero, len(ids))], f"{call.label} sums over it not as zero")
    call.count_macs(1, *(size if ids is None else ids for ids, _, size in table.values()))
    return call.make([table[c][0] for c in output], [table[c][1] for c in output])


def _letters(call: Call, operands: list[Value], words: list[str]) -> dict[str, tuple[Ids, Flags, int]]:
    """Ids, zero flags and size of every letter, unified over the operands that have it."""
    table: dict[str, tuple[Ids, Flags, int]] = {}
    for value, word in zip(operands, words, strict=True):
        for dim, letter in enumerate(word):
            ids, zero, size = value.ids[dim], value.zero[dim], value.shape[dim]
            if letter in table:
                other, other_zero, _ = table[letter]
                why = value.why or f"{call.label} pairs it with positions that stay"
                call.unify(other, ids, size, why)
                ids = other if other is not None else ids
                if ids is not None:
                    zero = flags(zero, size) | flags(other_zero, size)
            table[letter] = (ids, zero, size)
    return table


@register_rule("addmm", "baddbmm")
def addmm(call: Call) -> Result:
    """The bias of an explicit product is not followed; a product of fixed sizes is."""
    if any(v.tracked for v in call.values()):
        return call.give_up(f"{call.label} has no rule for pruned operands")
    left, right = list(call.values())[1:3]
    call.count_macs(1, *left.shape, right.shape[-1])
    return call.opaque(left.why)
