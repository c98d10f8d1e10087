"""Reductions and scans. Over space they keep channels; over channels they sum or freeze them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sparsekern.graph.propagate.rules.base import Call, Result, dense, flags, register_rule
from sparsekern.graph.propagate.values import Average, Flags, Value


def _dims(call: Call, x: Value) -> list[int]:
    dims = call.args.get("dim")
    if dims is None or dims == []:
        return list(range(x.ndim))
    listed = [dims] if isinstance(dims, int) else list(dims)
    return [dim % max(x.ndim, 1) for dim in listed]


def _reduced(
    call: Call,
    x: Value,
    dims: list[int],
    *,
    index: int = 0,
    clears: bool = False,
    average: Average | None = None,
) -> Value:
    keep = bool(call.args.get("keepdim", False))
    ids = [None if d in dims else i for d, i in enumerate(x.ids) if keep or d not in dims]
    zero: list[Flags] = [None if d in dims else z for d, z in enumerate(x.zero) if keep or d not in dims]
    if not clears:
        return call.make(ids, zero, index=index, average=average)
    zero = [None if z is None else np.zeros_like(z) for z in zero]
    return call.make(ids, zero, index=index, zero_broken_by=call.label)


def _reduce(call: Call, *, clears: bool) -> Value:
    x = next(call.values())
    dims = _dims(call, x)
    for dim in dims:
        call.inexact(x.ids[dim], f"{call.label} reduces over channels")
    return _reduced(call, x, dims, clears=clears)


@register_rule("amax", "amin", "var", "std", "prod", "max", "min", "any", "median")
def reduce_space(call: Call) -> Result:
    """A reduction of zeros over space is zero. Over channels it depends on their number."""
    return _reduce(call, clears=False)


@register_rule("mean", averages=True)
def mean(call: Call) -> Result:
    """A mean. Over channels that are zero where they are masked, it grows as they are removed."""
    x = call["self"]
    dims = _dims(call, x)
    tracked = [d for d in dims if x.ids[d] is not None]
    average = x.average
    if len(tracked) == 1 and average is None and not x.static:
        average = _average(call, x, tracked[0])
    elif tracked:
        for dim in tracked:
            call.inexact(x.ids[dim], f"{call.label} reduces over channels")
        call.lose(average)
        average = None
    return _reduced(call, x, dims, average=average)


def _average(call: Call, x: Value, dim: int) -> Average:
    """The factor of a mean over channels; those that are not zero are frozen."""
    for producer in x.origins:
        call.records.producers[producer].consumed = True
    ids, reason = dense(x.ids[dim], x.shape[dim]), f"{call.label} reduces over channels"
    call.inexact(ids[~flags(x.zero[dim], x.shape[dim])], reason)
    return Average(ids, 1.0, reason)


@register_rule("linalg_vector_norm", "norm", averages=True)
def vector_norm(call: Call) -> Result:
    """A norm of a positive order does not change if the channels that are removed are zero."""
    x, order = call["self"], call.args.get("ord", call.args.get("p", 2))
    dims = _dims(call, x)
    follows = not x.static and (order is None or (isinstance(order, (int, float)) and order > 0))
    for dim in dims:
        ids = x.ids[dim]
        if ids is not None and follows:
            for producer in x.origins:
                call.records.producers[producer].consumed = True
            ids = ids[~flags(x.zero[dim], x.shape[dim])]
        call.inexact(ids, f"{call.label} reduces over channels")
    if not follows:
        call.lose(x.average)
    return _reduced(call, x, dims, average=x.average if follows else None)


@register_rule("logsumexp", "argmax", "argmin", "all")
def reduce_away(call: Call) -> Result:
    """Reductions whose result for a map of zeros is not zero."""
    return _reduce(call, clears=True)


@register_rule("sum", averages=True)
def total(call: Call) -> Result:
    """A sum over channels does not change if the removed ones are zero."""
    x = next(call.values())
    dims = _dims(call, x)
    tracked = [dim for dim in dims if x.ids[dim] is not None]
    for dim in tracked:
        call.require_zero(x, dim)
    own = x.ids[tracked[0]] if len(tracked) == 1 and len(dims) == 1 and x.average is None else None
    return replace(_reduced(call, x, dims, average=x.average), total=own)


@register_rule("max.dim", "min.dim", "median.dim", "aminmax")
def extreme(call: Call) -> Result:
    """Extreme values and their positions. The positions in a map of zeros are not zero."""
    x = next(call.values())
    dims = _dims(call, x)
    for dim in dims:
        call.inexact(x.ids[dim], f"{call.label} reduces over channels")
    numbers = range(len(call.outputs))
    return tuple(_reduced(call, x, dims, index=i, clears=i > 0 and call.name != "aminmax") for i in numbers)


def _beside(call: Call, x: Value, dim: int, reason: str, *, index: int = 0, clears: bool = False) -> Value:
    """The output has the slots of ``x`` except along ``dim``, which is frozen for ``reason``."""
    call.freeze(x.ids[dim], reason)
    ids = [None if d == dim else i for d, i in enumerate(x.ids)]
    zero = [None if d == dim or z is None else z & (not clears) for d, z in enumerate(x.zero)]
    return call.make(ids, zero, index=index, zero_broken_by=call.label if clears else "")


@register_rule("cumsum", "cumprod")
def scan(call: Call) -> Result:
    x = call["self"]
    return _beside(call, x, call["dim"] % max(x.ndim, 1), f"{call.label} accumulates over channels")


@register_rule("logcumsumexp", "argsort")
def scan_away(call: Call) -> Result:
    x = call["self"]
    reason = f"{call.label} puts channels in an order"
    return _beside(call, x, call["dim"] % max(x.ndim, 1), reason, clears=True)


@register_rule("sort", "topk", "cummax", "cummin")
def order(call: Call) -> Result:
    """Ordered values and their old positions."""
    x = call["self"]
    dim, reason = call["dim"] % max(x.ndim, 1), f"{call.label} puts channels in an order"
    return tuple(_beside(call, x, dim, reason, index=i, clears=i > 0) for i in range(len(call.outputs)))
