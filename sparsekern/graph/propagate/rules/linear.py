"""Linear layers and embeddings."""

from __future__ import annotations

from sparsekern.graph.propagate.rules.base import Call, Result, flags, register_rule
from sparsekern.graph.propagate.values import Flags, Ids, Value


def fixed_bias(rows: Ids, weight: Value, bias: Value) -> str:
    """Why rows stay if only the weight or only the bias is tracked.

    Args:
        rows: slot ids of the weight's rows; None if the weight is not tracked.
        weight: the weight.
        bias: the bias.

    Returns:
        The reason of the tensor that is not tracked.
    """
    return (weight.untracked_reason if rows is None else bias.untracked_reason) or "tied to a fixed bias"


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
        call.unify(rows, bias.ids[0], size, fixed_bias(rows, weight, bias))
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
    untracked_reason = weight.untracked_reason if rows is None else ""
    return call.make(
        [*leading, rows], [*kept, zero], origins=origins, pure=made, untracked_reason=untracked_reason
    )


@register_rule("embedding")
def embedding(call: Call) -> Result:
    weight = call["weight"]
    call.freeze(weight.ids[0], f"{call.label} looks up rows by number")
    none = [None] * (len(call.shape()) - 1)
    made = call.produce("embedding", weight.ids[1], None)
    return call.make([*none, weight.ids[1]], [*none, weight.zero[1]], origins=made, pure=made)
