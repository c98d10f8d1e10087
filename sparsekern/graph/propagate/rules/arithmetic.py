"""Elementwise ops of several tensors, with broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np

from sparsekern.graph.propagate.rules.base import Call, Result, flags, register_rule
from sparsekern.graph.propagate.values import Flags, Ids, Value

Fold = Callable[[list[np.ndarray]], np.ndarray]


def every(zeros: list[np.ndarray]) -> np.ndarray:
    """Fold the zero flags of a sum: it is zero where all operands are."""
    return reduce(np.logical_and, zeros)


def some(zeros: list[np.ndarray]) -> np.ndarray:
    """Fold the zero flags of a product: it is zero where one operand is."""
    return reduce(np.logical_or, zeros)


def broadcast(call: Call, operands: list[Value]) -> list[Ids]:
    """Unify broadcast operands dimension by dimension. A dimension of size 1 is not coupled.

    Args:
        call: The op. Its first output has the broadcast shape.
        operands: The operands.

    Returns:
        Slot ids of the result's dimensions.
    """
    shape = call.shape()
    result: list[Ids] = []
    for dim, size in enumerate(shape):
        wide = [(v, v.ids[d]) for v, d in _aligned(operands, dim, len(shape)) if v.shape[d] > 1]
        tracked = [ids for _, ids in wide if ids is not None]
        if size == 1 or not tracked:
            result.append(None)
            continue
        untracked_reason = next(
            (v.untracked_reason for v, ids in wide if ids is None and v.untracked_reason), ""
        )
        reason = untracked_reason or f"{call.label} pairs it with positions that stay"
        for _, ids in wide:
            call.unify(tracked[0], ids, size, reason)
        result.append(tracked[0])
    return result


def _aligned(operands: list[Value], dim: int, ndim: int) -> list[tuple[Value, int]]:
    """The operands that have the result's dimension ``dim``, each with its own number of it."""
    shifted = [(v, dim - ndim + v.ndim) for v in operands]
    return [(v, d) for v, d in shifted if d >= 0]


def zeros(ids: list[Ids], operands: list[Value], fold: Fold) -> list[Flags]:
    """Fold the zero flags of broadcast operands.

    An operand of size 1 in a dimension is not zero when one channel is masked.

    Args:
        ids: Slot ids of the result's dimensions.
        operands: The operands.
        fold: ``every`` or ``some``.

    Returns:
        Zero flags of the result's dimensions; None where nothing is tracked.
    """
    result: list[Flags] = []
    for dim, tracked in enumerate(ids):
        if tracked is None:
            result.append(None)
            continue
        size = len(tracked)
        each = []
        for value in operands:
            own = dim - len(ids) + value.ndim
            wide = own >= 0 and value.shape[own] > 1
            each.append(flags(value.zero[own] if wide else None, size))
        result.append(fold(each))
    return result


def _operands(call: Call) -> tuple[list[Value], list[float]]:
    """The tensors and the numbers among the operands ``self`` and ``other``."""
    both = [call["self"], call["other"]]
    tensors = [v for v in both if isinstance(v, Value)]
    return tensors, [v for v in both if not isinstance(v, Value)]


@register_rule("add", "sub", "rsub", "subtract")
def add(call: Call) -> Result:
    tensors, numbers = _operands(call)
    ids = broadcast(call, tensors)
    zero = zeros(ids, tensors, every)
    if any(number != 0 for number in numbers):
        zero = [None if z is None else np.zeros_like(z) for z in zero]
    carried = [v for v in tensors if v.tracked]
    alone = len(carried) == 1 and not any(z is not None and z.any() for z in zero)
    return call.make(ids, zero, zero_broken_by=call.label if alone or numbers else "")


@register_rule("maximum", "minimum", "max.other", "min.other", "fmax", "fmin")
def maximum(call: Call) -> Result:
    tensors, _ = _operands(call)
    ids = broadcast(call, tensors)
    return call.make(ids, zeros(ids, tensors, every))


@register_rule("mul", "multiply")
def multiply(call: Call) -> Result:
    """A product keeps the zeros of its operands, and the producers of these zeros."""
    tensors, _ = _operands(call)
    ids = broadcast(call, tensors)
    zero = zeros(ids, tensors, some)
    return call.make(ids, zero)


@register_rule("div", "true_divide", "divide")
def divide(call: Call) -> Result:
    tensors, numbers = _operands(call)
    if numbers and not isinstance(call["self"], Value):
        return call.give_up(f"{call.label} of a zero is not finite")
    ids = broadcast(call, tensors)
    if len(tensors) == 2:
        below = zeros(ids, tensors[1:], some)
        for tracked, zero in zip(ids, below, strict=True):
            if tracked is not None and zero is not None and call.settled:
                call.freeze(tracked[zero], f"{call.label} divides by it where it is zero")
    return call.make(ids, zeros(ids, tensors[:1], some), origins=tensors[0].origins)


@register_rule("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor")
def compare(call: Call) -> Result:
    tensors, _ = _operands(call)
    ids = broadcast(call, tensors)
    zero: list[Flags] = [None if i is None else np.zeros(len(i), bool) for i in ids]
    return call.make(ids, zero, zero_broken_by=call.label)


@register_rule("where")
def where(call: Call) -> Result:
    if "self" not in call.args or "other" not in call.args:
        return call.give_up(f"{call.label} yields positions")
    tensors, numbers = _operands(call)
    ids = broadcast(call, [call["condition"], *tensors])
    if not tensors or any(number != 0 for number in numbers):
        zero: list[Flags] = [None if i is None else np.zeros(len(i), bool) for i in ids]
        return call.make(ids, zero, zero_broken_by=call.label)
    return call.make(ids, zeros(ids, tensors, every))


@register_rule("masked_fill")
def masked_fill(call: Call) -> Result:
    x, mask, value = call["self"], call["mask"], call["value"]
    ids = broadcast(call, [x, mask])
    if isinstance(value, Value) or value != 0:
        zero: list[Flags] = [None if i is None else np.zeros(len(i), bool) for i in ids]
        return call.make(ids, zero, zero_broken_by=call.label)
    return call.make(ids, zeros(ids, [x], every), origins=x.origins)


@register_rule("addcmul")
def addcmul(call: Call) -> Result:
    operands = [call["self"], call["tensor1"], call["tensor2"]]
    ids = broadcast(call, operands)
    product = zeros(ids, operands[1:], some)
    own = zeros(ids, operands[:1], every)
    both = [None if a is None or b is None else a & b for a, b in zip(own, product, strict=True)]
    return call.make(ids, both)


@register_rule("copy")
def copy(call: Call) -> Result:
    """The result has the zeros of the source. The old contents of the destination do not matter."""
    target, source = call["self"], call["src"]
    ids = broadcast(call, [target, source])
    return call.make(ids, zeros(ids, [source], every), origins=source.origins)
