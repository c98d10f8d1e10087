"""Reductions: free over space, a contraction or a change of meaning over channels."""

from __future__ import annotations

from ..values import Value
from .base import Call, Result, register_rule


def _dims(call: Call, x: Value) -> list[int]:
    dims = call.args.get("dim")
    if dims is None or dims == []:
        return list(range(x.ndim))
    listed = [dims] if isinstance(dims, int) else list(dims)
    return [dim % max(x.ndim, 1) for dim in listed]


def _reduced(call: Call, x: Value, dims: list[int]) -> Value:
    keep = bool(call.args.get("keepdim", False))
    ids = [None if d in dims else i for d, i in enumerate(x.ids) if keep or d not in dims]
    zero = [None if d in dims else z for d, z in enumerate(x.zero) if keep or d not in dims]
    return call.make(ids, zero)


@register_rule("mean", "amax", "amin", "linalg_vector_norm", "norm")
def reduce_space(call: Call) -> Result:
    """Zero over space stays zero; over channels the result depends on how many there are."""
    x = next(call.values())
    dims = _dims(call, x)
    for dim in dims:
        call.freeze(x.ids[dim], f"{call.label} reduces over channels")
    return _reduced(call, x, dims)


@register_rule("sum")
def total(call: Call) -> Result:
    """A sum over channels is exact when those that go are zero."""
    x = next(call.values())
    dims = _dims(call, x)
    for dim in dims:
        if x.ids[dim] is not None:
            call.require_zero(x, dim)
    return _reduced(call, x, dims)
