"""Concatenation and its inverses: cat, stack, split, chunk, slice, select, index."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sparsekern.graph.propagate.rules.arithmetic import every, joint
from sparsekern.graph.propagate.rules.base import Call, Result, dense, flags, register_rule
from sparsekern.graph.propagate.values import Flags, Ids, Value


def _pass_others(call: Call, values: list[Value], skip: int) -> tuple[list[Ids], list[Flags]]:
    """Ids and zero flags of all dimensions but ``skip``, unified. The result is zero where all parts are."""
    ids: list[Ids] = []
    zero: list[Flags] = []
    for dim in range(values[0].ndim):
        tracked = [v.ids[dim] for v in values if v.ids[dim] is not None]
        if dim == skip or not tracked:
            ids.append(None)
            zero.append(None)
            continue
        size = values[0].shape[dim]
        untracked_reason = next(
            (v.untracked_reason for v in values if v.ids[dim] is None and v.untracked_reason), ""
        )
        for value in values:
            reason = untracked_reason or f"{call.label} joins it with positions that stay"
            call.unify(tracked[0], value.ids[dim], size, reason)
        ids.append(joint(call, [v.ids[dim] for v in values]))
        zero.append(None if ids[-1] is None else every([flags(v.zero[dim], size) for v in values]))
    return ids, zero


@register_rule("cat", "concat", "concatenate", pure=True)
def cat(call: Call) -> Result:
    # torch accepts and ignores an empty vector in any concatenation.
    values = [v for v in call["tensors"] if v.shape != (0,)]
    if not values:
        return call.opaque("")
    dim = call["dim"] % values[0].ndim
    ids, zero = _pass_others(call, values, dim)
    if any(v.ids[dim] is not None for v in values):
        ids[dim] = np.concatenate([dense(v.ids[dim], v.shape[dim]) for v in values])
        # Positions that stay are never masked, so their flag does not matter.
        zero[dim] = np.concatenate([flags(v.zero[dim], v.shape[dim]) for v in values])
    return call.make(ids, zero)


@register_rule("stack", pure=True)
def stack(call: Call) -> Result:
    values = call["tensors"]
    dim = call["dim"] % (values[0].ndim + 1)
    ids, zero = _pass_others(call, values, -1)
    ids.insert(dim, None)
    zero.insert(dim, None)
    return call.make(ids, zero)


def _parts(call: Call, x: Value, dim: int) -> Result:
    """Cut ``x`` along ``dim``. Equal parts are tied position by position.

    The check of a smaller copy proves that the program cuts it at the right positions there, too.
    """
    sizes = [shape[dim] for shape, _ in call.outputs]
    ids, zero = x.ids[dim], flags(x.zero[dim], x.shape[dim])
    if ids is not None and len(set(sizes)) == 1:
        table = ids.reshape(len(sizes), -1)
        first = np.broadcast_to(table[:1], table.shape)
        call.slots.union(first.ravel(), ids, f"{call.label} cuts it into equal parts")
    made, start = [], 0
    for index, size in enumerate(sizes):
        part_ids, part_zero = list(x.ids), list(x.zero)
        part_ids[dim] = None if ids is None else ids[start : start + size]
        call.cut(part_ids[dim])
        part_zero[dim] = None if ids is None else zero[start : start + size]
        made.append(call.make(part_ids, part_zero, index=index))
        start += size
    return tuple(made)


@register_rule("chunk", pure=True, view=True)
def chunk(call: Call) -> Result:
    x = call["self"]
    return _parts(call, x, call["dim"] % x.ndim)


@register_rule("split", "split_with_sizes", "tensor_split", pure=True, view=True)
def split(call: Call) -> Result:
    x = call["self"]
    if any(isinstance(argument, Value) for argument in list(call.args.values())[1:]):
        return call.give_up(f"{call.label} cuts at positions computed from tensors")
    return _parts(call, x, call["dim"] % x.ndim)


@register_rule("slice", "narrow", pure=True, view=True)
def slice_(call: Call) -> Result:
    """A part of a dimension by numbers.

    The check of a smaller copy proves that the numbers follow the channels. Steps freeze the dimension.
    """
    x = call["self"]
    dim = call["dim"] % x.ndim
    ids, zero, own = list(x.ids), list(x.zero), x.ids[dim]
    size, step = call.shape()[dim], call.args.get("step", 1)
    if own is None or (size == x.shape[dim] and step == 1):
        return call.make(ids, zero)
    if step != 1 or isinstance(call["start"], Value):
        call.freeze(own, f"{call.label} cuts it by number")
        ids[dim] = zero[dim] = None
        return call.make(ids, zero)
    start, _, _ = slice(call["start"], None).indices(x.shape[dim])
    for part in (own[:start], own[: start + size], own[start : start + size], own[start + size :]):
        call.cut(part)
    ids[dim], zero[dim] = own[start : start + size], flags(zero[dim], len(own))[start : start + size]
    if size == 1:
        call.freeze(own, f"{call.label} cuts it by number")
        ids[dim] = zero[dim] = None
    return call.make(ids, zero)


def _up_to(ids: np.ndarray, place: int) -> np.ndarray:
    """The indices that have to stay if ``place`` is to name the same one: it and all before it.

    A place below 0 is counted from the end.
    """
    return ids[: place + 1] if place >= 0 else ids[place:]


@register_rule("select", "unbind", pure=True, view=True)
def select(call: Call) -> Result:
    x = call["self"]
    dim = call["dim"] % x.ndim
    own, place = x.ids[dim], call.args.get("index")
    if own is not None and isinstance(place, int):
        own = _up_to(own, place)
    call.freeze(own, f"{call.label} takes it apart by number")
    ids = [i for d, i in enumerate(x.ids) if d != dim]
    zero = [z for d, z in enumerate(x.zero) if d != dim]
    made = tuple(call.make(ids, zero, index=index) for index in range(len(call.outputs)))
    return made if call.name == "unbind" else made[0]


@register_rule("index_select")
def index_select(call: Call) -> Result:
    x = call["self"]
    dim = call["dim"] % x.ndim
    call.freeze(x.ids[dim], f"{call.label} picks it by number")
    ids = [None if d == dim else i for d, i in enumerate(x.ids)]
    zero = [None if d == dim else z for d, z in enumerate(x.zero)]
    return call.make(ids, zero)


def _named_by(ids: np.ndarray, places: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The indices that have to stay if ``places`` are to name the same ones."""
    from_end = [place for place in places if place < 0]
    first = ids[: max(places) + 1] if max(places) >= 0 else ids[:0]
    return first, ids[min(from_end) :] if from_end else ids[:0]


@register_rule("index")
def index(call: Call) -> Result:
    """Indexing by tensors that hold positions. Dimensions that are not indexed do not change.

    The indexed dimensions and those of the positions, such as a table of relative positions in a buffer,
    are frozen. Of a dimension that a constant indexes, what lies behind all of its numbers is not. The
    positions take the place of the indexed dimensions, or come first if others lie between.
    """
    x, indices = call["self"], call["indices"]
    used = [d for d, item in enumerate(indices) if item is not None]
    for dim in used:
        own = x.ids[dim]
        for part in (
            (own,) if own is None or not indices[dim].numbers else _named_by(own, indices[dim].numbers)
        ):
            call.freeze(part, f"{call.label} picks it by number")
        for own in indices[dim].ids:
            call.freeze(own, f"{call.label} picks by the numbers that it holds")
    adjacent = used == list(range(used[0], used[-1] + 1))
    kept = [d for d in range(x.ndim) if d not in used]
    front = [d for d in kept if adjacent and d < used[0]]
    positions: list[None] = [None] * (len(call.shape()) - len(kept))
    back = kept[len(front) :]
    ids = [*(x.ids[d] for d in front), *positions, *(x.ids[d] for d in back)]
    zero = [*(x.zero[d] for d in front), *positions, *(x.zero[d] for d in back)]
    made = call.make(ids, zero)
    # Whole matrices are picked, as those of experts.
    return replace(made, picked=x.weight and not made.static and max(used) < x.ndim - 2)


@register_rule("gather", "take_along_dim")
def gather(call: Call) -> Result:
    """Elements picked by number along one dimension. The other dimensions run beside those of the numbers."""
    x, positions = call["self"], call["index" if "index" in call.args else "indices"]
    if call.args.get("dim") is None or positions.ndim != x.ndim:
        return call.give_up(f"{call.label} picks from a flattened tensor")
    dim = call["dim"] % x.ndim
    call.freeze(x.ids[dim], f"{call.label} picks it by number")
    call.freeze(positions.ids[dim], f"{call.label} picks by the numbers that it holds")
    ids: list[Ids] = list(x.ids)
    zero: list[Flags] = list(x.zero)
    ids[dim] = zero[dim] = None
    for d, own in enumerate(x.ids):
        if d == dim:
            continue
        size = call.shape()[d]
        if size == x.shape[d] == positions.shape[d]:
            reason = positions.untracked_reason or f"{call.label} pairs it with positions that stay"
            call.unify(own, positions.ids[d], size, reason)
        else:
            # The numbers are fewer than the elements beside them, or one of the two is broadcast.
            call.freeze(own, f"{call.label} picks it by number")
            call.freeze(positions.ids[d], f"{call.label} picks by the numbers that it holds")
            ids[d] = zero[d] = None
    return call.make(ids, zero, origins=x.origins)
