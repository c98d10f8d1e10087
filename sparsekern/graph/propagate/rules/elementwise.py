"""Elementwise ops of one tensor, by their effect on zeros."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sparsekern.graph.propagate.records import Shaped
from sparsekern.graph.propagate.rules.averages import affine, bounded, raised
from sparsekern.graph.propagate.rules.base import Call, Result, flags, register_rule
from sparsekern.graph.propagate.values import Value


def same(call: Call) -> Value:
    """The result has the slots and zeros of the first operand."""
    x = next(call.values())
    return call.make(x.ids, x.zero)


def cleared(call: Call) -> Value:
    """The result has the slots of the first operand, and none is known to be zero."""
    x = next(call.values())
    zero = [None if i is None else np.zeros(len(i), bool) for i in x.ids]
    return call.make(x.ids, zero, zero_broken_by=call.label)


KEEP_ZERO = """
relu6 rrelu silu hardswish gelu tanh mish elu selu celu softshrink hardshrink sign
sin sinh tan asin atan asinh erf expm1 log1p floor ceil round trunc frac
"""
IDENTITIES = "contiguous clone alias to _to_copy detach type_as lift_fresh_copy lift_fresh"
CLEAR_ZERO = """
sigmoid hardsigmoid exp exp2 cos cosh log_sigmoid softplus logical_not bitwise_not isnan isinf
isfinite erfc acos
"""


def copied(call: Call) -> Value:
    """The result has the slots, zeros and known numbers of the first operand."""
    return replace(same(call), numbers=next(call.values()).numbers)


register_rule(*KEEP_ZERO.split())(same)
register_rule(*IDENTITIES.split(), pure=True, view=True)(copied)
# Dropout multiplies elements or channels by a random mask: a zero stays zero, a scale passes through.
register_rule("dropout", "feature_dropout", pure=True, view=True)(same)
register_rule("relu", "leaky_relu", pure=True)(same)
register_rule(*CLEAR_ZERO.split())(cleared)


_POWERS = {"sqrt": 0.5, "square": 2.0}


@register_rule("sqrt", "square", "neg", "negative", "abs", "absolute", averages=True)
def powers(call: Call) -> Result:
    """Powers that keep zeros, and signs."""
    x = call["self"]
    average = raised(x.average, _POWERS.get(call.name.rstrip("_"), 1.0))
    made = affine(x, -1.0, 0.0) if call.name.startswith("neg") else None
    return call.make(x.ids, x.zero, average=average, affine=made)


def _bounded(call: Call, low: float | None, high: float | None) -> Value:
    keeps = (low is None or low <= 0) and (high is None or high >= 0)
    return same(call) if keeps else cleared(call)


@register_rule("hardtanh")
def hardtanh(call: Call) -> Result:
    return _bounded(call, call["min_val"], call["max_val"])


@register_rule("clamp", "clip", "clamp_min", "clamp_max", averages=True)
def clamp(call: Call) -> Result:
    """Bounds. The bounds of a mean over channels have to grow with it."""
    low, high = call.args.get("min"), call.args.get("max")
    if isinstance(low, Value) or isinstance(high, Value):
        return call.give_up(f"{call.label} has tensors as bounds")
    made, average = _bounded(call, low, high), call["self"].average
    for bound in (low, high):
        average = average if bound is None else bounded(call, average, float(bound), call.shape())
    return replace(made, average=average)


@register_rule("threshold")
def threshold(call: Call) -> Result:
    keeps = call["threshold"] < 0 or call["value"] == 0
    return same(call) if keeps else cleared(call)


@register_rule("prelu")
def prelu(call: Call) -> Result:
    x, weight = call["self"], call["weight"]
    if weight.ids and weight.ids[0] is not None and x.ndim > 1:
        reason = x.untracked_reason or f"{call.label} reads positions that stay"
        call.unify(x.ids[1], weight.ids[0], weight.shape[0], reason)
    elif x.ndim > 1 and weight.shape != (1,) and weight.ndim:
        call.freeze(x.ids[1], weight.untracked_reason or f"{call.label} has a fixed slope per channel")
    return call.make(x.ids, x.zero, origins=x.origins)


@register_rule("glu")
def glu(call: Call) -> Result:
    """The first half times the sigmoid of the second. Equal positions of both halves are one channel."""
    x, dim = call["self"], call["dim"] % call["self"].ndim
    ids, zero = list(x.ids), list(x.zero)
    if ids[dim] is not None:
        half = len(ids[dim]) // 2
        call.slots.union(ids[dim][:half], ids[dim][half:], f"{call.label} pairs its halves")
        ids[dim], zero[dim] = ids[dim][:half], flags(zero[dim], 2 * half)[:half]
    return call.make(ids, zero)


@register_rule("bernoulli", "normal", "uniform", "exponential", "log_normal", "geometric", "cauchy")
def drawn(call: Call) -> Result:
    """Random numbers in the shape of the operand, which may give their probabilities."""
    return cleared(call)


@register_rule("fill")
def fill(call: Call) -> Result:
    value = call["value"]
    return zeros_like(call) if not isinstance(value, Value) and value == 0 else cleared(call)


@register_rule("zeros_like", "zero")
def zeros_like(call: Call) -> Result:
    """Zeros whose size follows the operand."""
    x = next(call.values())
    return call.make(
        x.ids, [None if i is None else np.ones(len(i), bool) for i in x.ids], origins=frozenset()
    )


@register_rule("ones_like", "full_like", "empty_like", "rand_like", "randn_like")
def filled_like(call: Call) -> Result:
    return cleared(call)


@register_rule("zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full")
def named_size(call: Call) -> Result:
    """A tensor of one value whose sizes the program names. A smaller copy shows whether they follow."""
    shape = call.shape()
    ids = call.named(shape)
    if call.settled:
        call.records.shaped.append(Shaped(call.module, (), shape, tuple(ids)))
    empty = call.name.endswith("zeros") or call.args.get("fill_value") == 0
    zero = [None if own is None else np.full(len(own), empty) for own in ids]
    return call.make(
        ids,
        zero,
        origins=frozenset(),
        untracked_reason="tied to a tensor of fixed size",
        zero_broken_by="" if empty else call.label,
    )


@register_rule(
    "rand",
    "randn",
    "arange",
    "scalar_tensor",
    "linspace",
    "eye",
    "empty_strided",
    "_assert_tensor_metadata",
    "randint",
)
def fixed_size(call: Call) -> Result:
    """A tensor whose size the program names, so that it cannot change."""
    return call.opaque("tied to a tensor of fixed size")
