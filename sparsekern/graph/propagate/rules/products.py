"""Products of two tensors: matrices, vectors, einsum."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sparsekern.graph.propagate.constants import mask_columns
from sparsekern.graph.propagate.rules.arithmetic import broadcast, every, zeros
from sparsekern.graph.propagate.rules.base import Call, Result, flags, register_rule
from sparsekern.graph.propagate.values import Flags, Ids, Value


def _product(
    call: Call, left: Value, right: Value, *, counted: bool = True
) -> tuple[list[Ids], list[Flags], frozenset[int]]:
    """Multiply matrices.

    Args:
        call: the op.
        left: a value of shape [..., m, k].
        right: a value of shape [..., k, n].
        counted: whether to count multiply-adds. Products with a vector are not counted, because
            torch's counter does not count them either.

    Returns:
        Slot ids, zero flags and origins of the product, of shape [..., m, n].
    """
    batch, m, k = left.ndim - 2, left.ndim - 2, left.ndim - 1
    size = left.shape[k]
    reason = left.untracked_reason or right.untracked_reason or f"{call.label} reads positions that stay"
    call.unify(left.ids[k], right.ids[-2], size, reason)
    vanishes = _vanishing(call, left, k, right, -2) | _vanishing(call, right, -2, left, k)
    ids = left.ids[k] if left.ids[k] is not None else right.ids[-2]
    if ids is not None:
        _consume(call, left, right)
        by = left.zero_broken_by or right.zero_broken_by
        reason = f"{call.label} sums over it not as zero" + (f" after {by}" if by else "")
        call.inexact(ids[~vanishes], reason)
    made: frozenset[int] = frozenset()
    if right.weight and not left.weight:
        made = call.produce("dense", right.ids[-1], None)
    elif left.weight and not right.weight:
        made = call.produce("dense", left.ids[m], None)
    out_ids, out_zero = _batch_dims(call, left, right, batch)
    out_ids += [left.ids[m], right.ids[-1]]
    out_zero += [left.zero[m], right.zero[-1]]
    if not counted:
        return out_ids, out_zero, left.origins | right.origins | made
    call.count_macs(
        1,
        *(call.size(left if left.shape[d] > 1 else right, d) for d in range(batch)),
        call.size(left, m),
        call.size(left, k) if left.ids[k] is not None else call.size(right, right.ndim - 2),
        call.size(right, right.ndim - 1),
    )
    return out_ids, out_zero, left.origins | right.origins | made


def _vanishing(call: Call, value: Value, dim: int, weight: Value, weight_dim: int) -> np.ndarray:
    """Which positions of ``dim`` add nothing: the value is zero, or the weight's columns are masked."""
    zero, columns = flags(value.zero[dim], value.shape[dim]), weight.ids[weight_dim]
    if value.ids[dim] is None or columns is None:
        return zero
    found = mask_columns(call.records, value, dim, weight, columns, call.node, settled=call.settled)
    return flags(found, value.shape[dim])


def _consume(call: Call, left: Value, right: Value) -> None:
    for value in (left, right):
        for producer in value.origins:
            call.records.producers[producer].consumed = True
    if right.weight and not left.weight and right.ids[-2] is not None:
        call.records.consume(right.ids[-2])
    if left.weight and not right.weight and left.ids[-1] is not None:
        call.records.consume(left.ids[-1])


def _batch_dims(call: Call, left: Value, right: Value, batch: int) -> tuple[list[Ids], list[Flags]]:
    """Ids and zero flags of the leading dimensions, coupled where both sizes are larger than 1."""
    ids: list[Ids] = []
    zero: list[Flags] = []
    for dim in range(batch):
        wide = [v for v in (left, right) if v.shape[dim] > 1 and v.ids[dim] is not None]
        if left.shape[dim] > 1 and right.shape[dim] > 1:
            reason = f"{call.label} pairs it with positions that stay"
            call.unify(left.ids[dim], right.ids[dim], left.shape[dim], reason)
        ids.append(wide[0].ids[dim] if wide else None)
        flag: Flags = None
        for value in wide:
            flag = value.zero[dim] if flag is None else flag | flags(value.zero[dim], len(flag))
        zero.append(flag)
    return ids, zero


def _padded(value: Value, ndim: int) -> Value:
    """The value with dimensions of size 1 in front, so that it has ``ndim`` dimensions."""
    none: tuple[None, ...] = (None,) * (ndim - value.ndim)
    shape = (1,) * len(none) + value.shape
    return replace(value, shape=shape, ids=none + value.ids, zero=none + value.zero)


def _column(vector: Value) -> Value:
    """A vector of shape [k] as a matrix of shape [k, 1]."""
    return replace(vector, shape=(*vector.shape, 1), ids=(*vector.ids, None), zero=(*vector.zero, None))


@register_rule("matmul", "bmm", "mm", "mv", "dot", "vdot")
def matmul(call: Call) -> Result:
    """A matrix product. A vector is a row on the left and a column on the right."""
    left, right = list(call.values())[:2]
    dropped = []
    if left.ndim == 1:
        dropped.append(-2)
    if right.ndim == 1:
        right = _column(right)
        dropped.append(-1)
    ndim = max(left.ndim, right.ndim, 2)
    counted = -1 not in dropped
    ids, zero, origins = _product(call, _padded(left, ndim), _padded(right, ndim), counted=counted)
    kept = [d for d in range(ndim) if d - ndim not in dropped]
    return call.make([ids[d] for d in kept], [zero[d] for d in kept], origins=origins)


@register_rule("addmm", "baddbmm", "addmv")
def addmm(call: Call) -> Result:
    """A product plus a summand, each times a number."""
    bias, left, right = list(call.values())[:3]
    if right.ndim == 1:
        right = _column(right)
    ids, zero, origins = _product(call, left, right, counted=call.name != "addmv")
    if len(call.shape()) < left.ndim:
        ids, zero = ids[:-1], zero[:-1]
    product = replace(call.make(ids, zero, origins=origins), shape=call.shape())
    operands = [bias, product]
    joined = broadcast(call, operands)
    return call.make(joined, zeros(joined, operands, every), origins=origins | bias.origins)


@register_rule("_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_mm(call: Call) -> Result:
    """Rows of a matrix times the matrix of their expert: ``[S, k]`` times ``[E, k, n]``. No expert goes."""
    x, weights, ends = list(call.values())[:3]
    if (x.ndim, weights.ndim) != (2, 3) or len(list(call.values())) > 3:
        return call.give_up(f"{call.label} of other shapes is not followed")
    for ids in (x.ids[0], weights.ids[0], ends.ids[0]):
        call.freeze(ids, f"{call.label} counts the rows of every expert")
    call.contract(x, 1, weights, 1)
    made = call.produce("dense", weights.ids[2], None)
    call.count_macs(1, x.shape[0], call.size(x, 1), call.size(weights, 2))
    return call.make(
        [None, weights.ids[2]], [None, weights.zero[2]], origins=x.origins | made, pure=frozenset()
    )


@register_rule("einsum")
def einsum(call: Call) -> Result:
    """An einsum of one or two operands, with each letter at most once in an operand, and ``...``."""
    operands = call["tensors"]
    words, output = _words(call["equation"], operands)
    if len(operands) > 2 or any(len(set(word)) < len(word) for word in (*words, output)):
        return call.give_up(f"{call.label}({call['equation']}) is not followed")
    table = _letters(call, operands, words)
    made: frozenset[int] = frozenset()
    for number, (value, word) in enumerate(zip(operands, words, strict=True)):
        for producer in value.origins:
            call.records.producers[producer].consumed = True
        others = "".join(words[:number] + words[number + 1 :])
        weight = value.static and not all(v.static for v in operands)
        for own, letter in zip(value.ids, word, strict=True):
            if weight and own is not None and letter not in output:
                call.records.consume(own)
            elif weight and letter not in others:
                made |= call.produce("dense", own, None)
    for letter, (ids, zero, _) in table.items():
        if letter not in output and ids is not None:
            call.inexact(ids[~flags(zero, len(ids))], f"{call.label} sums over it not as zero")
    if len(operands) == 2:
        call.count_macs(1, *(size if ids is None else ids for ids, _, size in table.values()))
    origins = made.union(*(v.origins for v in operands))
    return call.make([table[c][0] for c in output], [table[c][1] for c in output], origins=origins)


def _words(equation: str, operands: list[Value]) -> tuple[list[str], str]:
    """The letters of every operand and of the result. Capital Greek letters replace ``...``."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    words = inputs.split(",")
    extra = [v.ndim - len(w.replace("...", "")) for v, w in zip(operands, words, strict=True) if "..." in w]
    spare = "".join(chr(0x391 + n) for n in range(max(extra, default=0)))
    if not arrow:
        named = sorted(c for c in set(inputs) - set(".,") if inputs.count(c) == 1)
        output = ("..." if spare else "") + "".join(named)
    for number, (value, word) in enumerate(zip(operands, words, strict=True)):
        width = value.ndim - len(word.replace("...", ""))
        words[number] = word.replace("...", spare[len(spare) - width :] if width else "")
    return words, output.replace("...", spare)


def _letters(call: Call, operands: list[Value], words: list[str]) -> dict[str, tuple[Ids, Flags, int]]:
    """Ids, zero flags and size of every letter, unified over the operands that have it.

    A product is zero where one operand is. A dimension of size 1 is broadcast and not coupled.
    """
    table: dict[str, tuple[Ids, Flags, int]] = {}
    for value, word in zip(operands, words, strict=True):
        for dim, letter in enumerate(word):
            ids, zero, size = value.ids[dim], value.zero[dim], value.shape[dim]
            other, other_zero, known = table.get(letter, (None, None, 1))
            if known > 1 and size > 1:
                reason = value.untracked_reason or f"{call.label} pairs it with positions that stay"
                call.unify(other, ids, size, reason)
            if other is not None:
                ids = other
            if ids is not None:
                zero = flags(zero, len(ids)) | flags(other_zero, len(ids))
            table[letter] = (ids, zero, max(size, known))
    return table
