"""Normalisations. Removal is exact under one that acts per channel, but not under one over channels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sparsekern.graph.propagate.rules.averages import bounded, product, raised
from sparsekern.graph.propagate.rules.base import Call, Result, flags, register_rule
from sparsekern.graph.propagate.values import Average, Flags, Ids, Value


def _per_channel(call: Call, operands: tuple[str, ...]) -> Result:
    """Tie the channels of the input to operands of shape [channels].

    The result is zero where the rows of the affine are.

    Args:
        call: the op.
        operands: names of these operands. They may be None.

    Returns:
        The output.
    """
    x = call["input"]
    if x.ndim < 2:
        return call.give_up(f"{call.label} has no channel dimension")
    size, ids = x.shape[1], x.ids[1]
    known = [call[name] for name in operands if call[name] is not None]
    if not all(other.static for other in known):
        return call.give_up(f"{call.label} has an affine computed from activations")
    for other in known:
        reason = x.untracked_reason or other.untracked_reason or f"{call.label} reads positions that stay"
        call.unify(ids, other.ids[0], size, reason)
        ids = other.ids[0] if ids is None else ids
    weight, bias = call["weight"], call["bias"]
    zero: Flags = None
    made: frozenset[int] = frozenset()
    pure: frozenset[int] = frozenset()
    if ids is not None:
        # Without an affine, a map of zeros stays zero unless a running mean is subtracted.
        stored = call.args.get("running_mean") is not None
        zero = np.zeros(size, bool) if stored else flags(x.zero[1], size)
        made = x.origins if zero.any() else frozenset()
    if ids is not None and weight is not None:
        zero = flags(weight.zero[0], size)
        zero = zero if bias is None else zero & flags(bias.zero[0], size)
        pure = call.produce("norm", weight.ids[0], None if bias is None else bias.ids[0])
        made = x.origins | pure
    for producer in x.pure:
        call.records.producers[producer].norms.extend(pure)
        call.records.producers[producer].mixed |= not pure
    out_ids: list[Ids] = list(x.ids)
    out_zero: list[Flags] = [None if i is None else np.zeros(len(i), bool) for i in out_ids]
    out_ids[1], out_zero[1] = ids, zero
    zero_broken_by = f"{call.label}, which has no affine" if weight is None else call.label
    kept = zero is None or zero.all()
    return call.make(
        out_ids, out_zero, origins=made, pure=pure, zero_broken_by="" if kept else zero_broken_by
    )


@register_rule("batch_norm", norm=True)
def batch_norm(call: Call) -> Result:
    _freeze_others(call)
    return _per_channel(call, ("weight", "bias", "running_mean", "running_var"))


@register_rule("instance_norm", norm=True)
def instance_norm(call: Call) -> Result:
    _freeze_others(call)
    return _per_channel(call, ("weight", "bias", "running_mean", "running_var"))


@register_rule("group_norm", norm=True)
def group_norm(call: Call) -> Result:
    """Group norm. The channels of a normalisation group are tied, so that removal is exact."""
    x, groups = call["input"], call["num_groups"]
    _freeze_others(call)
    if groups == 1:
        reason = _over_channels(call)
        if call.exact or call["weight"] is None:
            return call.give_up(reason)
        call.inexact(x.ids[1], reason)
        return _per_channel(call, ("weight", "bias"))
    if x.ids[1] is not None:
        table = x.ids[1].reshape(groups, -1)
        first = np.broadcast_to(table[:, :1], table.shape).ravel()
        call.slots.union(first, x.ids[1], f"{call.label} has groups that go whole")
    return _per_channel(call, ("weight", "bias"))


def _freeze_others(call: Call) -> None:
    x = call["input"]
    for dim in range(x.ndim):
        if dim != 1:
            call.freeze(x.ids[dim], f"{call.label} takes its statistics over it")


@register_rule("rms_norm", "_fused_rms_norm", averages=True)
def rms_norm(call: Call) -> Result:
    """Division by the root of a mean of squares, which grows as channels that are zero are removed.

    The weight makes up for it, and the epsilon grows with the mean.
    """
    x, weight, over = call["input"], call["weight"], len(call["normalized_shape"])
    if over != 1 or x.ids[-1] is None or x.static:
        return _fixed_rms(call, x, weight, over)
    ids, size = x.ids[-1], x.shape[-1]
    if weight is not None:
        reason = x.untracked_reason or weight.untracked_reason or f"{call.label} reads positions that stay"
        call.unify(ids, weight.ids[0], size, reason)
    for producer in x.origins:
        call.records.producers[producer].consumed = True
    reason = _over_channels(call)
    call.inexact(ids[~flags(x.zero[-1], size)], reason)
    number, default = _epsilon(call)
    mean = bounded(call, Average(ids, 1.0, reason), number, x.shape, default=default)
    call.lose(x.average)
    root = replace(x, average=raised(mean, -0.5))
    average = product(call, [(root, 1.0), *([(weight, 1.0)] if weight is not None else [])])
    zero = list(x.zero)
    if weight is not None and weight.zero[0] is not None:
        zero[-1] = flags(zero[-1], size) | weight.zero[0]
    made = call.make(x.ids, zero, origins=x.origins, average=average)
    if len(call.outputs) == 1:
        return made
    clear = [None if i is None else np.zeros(len(i), bool) for i in x.ids[:-1]]
    return made, call.make([*x.ids[:-1], None], [*clear, None], index=1, average=root.average)


def _fixed_rms(call: Call, x: Value, weight: Value | None, over: int) -> Result:
    """RMS norm over dimensions of which none is followed as channels."""
    for dim in range(x.ndim - over, x.ndim):
        call.freeze(x.ids[dim], _over_channels(call))
    for affine in weight.ids if weight is not None else ():
        call.freeze(affine, _over_channels(call))
    call.lose(x.average)
    ids = [*x.ids[: x.ndim - over], *[None] * over]
    zero = [None if i is None else z for i, z in zip(ids, x.zero, strict=True)]
    made = [
        call.make(ids[: len(shape)], zero[: len(shape)], index=n) for n, (shape, _) in enumerate(call.outputs)
    ]
    return made[0] if len(made) == 1 else tuple(made)


def _epsilon(call: Call) -> tuple[float, bool]:
    """The epsilon, and whether the op takes it by default: the smallest step of the input's dtype at 1."""
    given = call["eps"]
    if given is not None:
        return float(given), False
    traced = next(n.meta["val"] for n in call.node.all_input_nodes if isinstance(n.meta.get("val"), Tensor))
    return torch.finfo(traced.dtype).eps, True


@register_rule("layer_norm")
def layer_norm(call: Call) -> Result:
    """Layer norm. Removal is exact only if the normalised dimensions hold no channels."""
    x, weight, bias = call["input"], call["weight"], call.args.get("bias")
    over = len(call["normalized_shape"])
    if not call.exact and over == 1 and x.ids[-1] is not None:
        return _over_last(call)
    reason = _over_channels(call)
    for dim in range(x.ndim - over, x.ndim):
        call.freeze(x.ids[dim], reason)
    for affine in (weight, bias):
        for ids in affine.ids if affine is not None else ():
            call.freeze(ids, reason)
    ids = list(x.ids[: x.ndim - over]) + [None] * over
    kept = bias is None
    zero = [None if i is None else z & kept for i, z in zip(ids, x.zero, strict=True)]
    return call.make(ids, zero, zero_broken_by="" if kept else call.label)


def _over_channels(call: Call) -> str:
    return f"{call.label} normalises over channels (removing some changes the others)"


def _over_last(call: Call) -> Result:
    """Normalisation over channels that may be removed inexactly. Zeros come only from the affine."""
    x, affines = call["input"], [call["weight"], call.args.get("bias")]
    known = [affine for affine in affines if affine is not None]
    if not all(affine.static for affine in known):
        return call.give_up(f"{call.label} has an affine computed from activations")
    ids, size = x.ids[-1], x.shape[-1]
    call.inexact(ids, _over_channels(call))
    for affine in known:
        call.unify(
            ids, affine.ids[0], size, affine.untracked_reason or f"{call.label} reads positions that stay"
        )
    zero = [None if i is None else np.zeros(len(i), bool) for i in x.ids]
    made: frozenset[int] = frozenset()
    if known and affines[0] is not None:
        zero[-1] = np.logical_and.reduce([flags(affine.zero[0], size) for affine in known])
        made = call.produce("norm", known[0].ids[0], known[1].ids[0] if len(known) > 1 else None)
    return call.make(x.ids, zero, origins=made, pure=made, zero_broken_by=call.label)


@register_rule("softmax", "log_softmax", "_softmax", "_log_softmax", "softmin")
def softmax(call: Call) -> Result:
    x = call["self"]
    dim = call["dim"] % max(x.ndim, 1)
    call.inexact(x.ids[dim], f"{call.label} normalises over channels")
    ids = [None if d == dim and call.exact else i for d, i in enumerate(x.ids)]
    zero = [None if i is None else np.zeros(len(i), bool) for i in ids]
    return call.make(ids, zero, zero_broken_by=call.label)


@register_rule("_weight_norm")
def weight_norm(call: Call) -> Result:
    """Weight norm divides a row by its norm, which is 0 for a masked row."""
    return call.give_up(f"{call.label} divides rows by their norm, which is 0 where they are masked")
