"""Ops that move indices: reshapes, permutations, shuffles, repeats."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sparsekern.graph.propagate.records import Shaped
from sparsekern.graph.propagate.rules.base import Call, Result, dense, flags, register_rule
from sparsekern.graph.propagate.values import Flags, Ids, Value


def _blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[range, range]]:
    """Match the dimensions of two shapes with equal products.

    Args:
        before: sizes before a reshape.
        after: sizes after it.

    Returns:
        The smallest pairs of runs of dimensions with equal products. Dimensions of size 1 between
        blocks are left out.
    """
    blocks, i, j = [], 0, 0
    while i < len(before) and j < len(after):
        if before[i] == 1 or after[j] == 1:
            i, j = i + (before[i] == 1), j + (after[j] == 1)
            continue
        start, left, right = (i, j), before[i], after[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        blocks.append((range(start[0], i), range(start[1], j)))
    return blocks


def _flat(call: Call, x: Value, dims: range) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids and zero flags of a block in memory order, along the one of its dimensions that holds channels.

    Of several dimensions the first one does, such as that of the heads in front of the positions inside of
    them. A size that the program names comes last. The other dimensions stay what they are. A weight keeps
    all of its dimensions: None.
    """
    tracked = [d for d in dims if x.ids[d] is not None]
    several = len(tracked) > 1
    order = sorted((several and call.slots.are_named(dense(x.ids[d], x.shape[d])), d) for d in tracked)
    if x.static and sum(not named for named, _ in order) > 1:
        return None
    carrier, *others = [d for _, d in order]
    for d in others:
        call.slots.freeze(dense(x.ids[d], x.shape[d]), f"{call.label} merges it with channels")
    shape = [x.shape[d] for d in dims]
    where = [1] * len(shape)
    where[carrier - dims.start] = -1
    ids, zero = x.ids[carrier], flags(x.zero[carrier], x.shape[carrier])
    assert ids is not None
    spread = (np.broadcast_to(a.reshape(where), shape).ravel() for a in (ids, zero))
    return next(spread), next(spread)


def reshape(call: Call, x: Value, sizes: Sequence[int] | None) -> Value:
    """Reshape a value.

    Args:
        call: the op. Its first output has the new shape.
        x: the value.
        sizes: the sizes that the program names (-1: inferred); None if they follow the operand.

    Returns:
        The output.
    """
    shape = call.shape()
    ids: list[Ids] = [None] * len(shape)
    zero: list[Flags] = [None] * len(shape)
    if 0 in shape:
        return call.make(ids, zero)
    inferred = list(sizes).index(-1) if sizes is not None and -1 in sizes else None
    for old, new in _blocks(x.shape, shape):
        if all(x.ids[d] is None for d in old):
            continue
        flat = _flat(call, x, old)
        if flat is None:
            for d in old:
                call.freeze(x.ids[d], f"{call.label} merges two dimensions that hold channels")
            continue
        axes = [d for d in new if shape[d] > 1]
        axis = _carrier(call, flat[0], [shape[d] for d in axes], axes, inferred)
        table, truth = (a.reshape([shape[d] for d in axes]) for a in flat)
        others = tuple(k for k in range(len(axes)) if k != axis)
        ids[axes[axis]] = table[tuple(slice(None) if k == axis else 0 for k in range(table.ndim))]
        zero[axes[axis]] = np.all(truth, axis=others)
    if sizes is not None and call.settled:
        call.records.shaped.append(Shaped(call.module, x.shape, shape, tuple(ids)))
    return call.make(ids, zero)


def _carrier(call: Call, flat: np.ndarray, shape: list[int], axes: list[int], inferred: int | None) -> int:
    """Choose the axis that carries the channels of a dimension that is split.

    If the slots differ along one axis only, it is this axis. Otherwise one axis carries the channels
    and the slots are tied along the others. The first choice is the axis whose size is inferred. Of two
    axes with given sizes it is the second, because the first axis of a channel shuffle is the number
    of groups. Of more axes it is the last but one, as in a split into queries, keys and values of
    heads. Another interpretation is tried if this choice is frozen.

    Args:
        call: the op.
        flat: slot ids of the dimension in memory order, int64.
        shape: sizes of the axes.
        axes: the result's dimension of every axis.
        inferred: the result's dimension whose size is inferred; None if there is none.

    Returns:
        An index into ``axes``.
    """
    table = call.slots.find(flat).reshape(shape)
    varies = [k for k in range(len(shape)) if (table != np.take(table, [0], axis=k)).any()]
    if len(varies) <= 1:
        return varies[0] if varies else len(shape) - 1
    last = len(shape) - 1
    first = axes.index(inferred) if inferred in axes else last if len(shape) == 2 else last - 1
    carrier = len(shape) + call.split(flat, (first - len(shape), -2, -1))
    chosen = tuple(slice(None) if k == carrier else slice(0, 1) for k in range(len(shape)))
    raw = flat.reshape(shape)
    tied = np.broadcast_to(raw[chosen], shape).ravel()
    call.slots.union(tied, flat, f"{call.label} splits it into equal groups")
    return carrier


@register_rule("view", "reshape", "_unsafe_view", pure=True, view=True)
def view(call: Call) -> Result:
    sizes = call.args.get("size", call.args.get("shape"))
    if sizes is None:
        return call.give_up(f"{call.label} reinterprets the bytes")
    return reshape(call, call["self"], sizes)


@register_rule("flatten", pure=True, view=True)
def flatten(call: Call) -> Result:
    return reshape(call, call["self"], None)


@register_rule("reshape_as", "view_as", pure=True, view=True)
def reshape_as(call: Call) -> Result:
    return reshape(call, call["self"], call.shape())


@register_rule("unflatten", pure=True, view=True)
def unflatten(call: Call) -> Result:
    x = call["self"]
    dim = call["dim"] % x.ndim
    rest = x.shape[dim + 1 :]
    return reshape(call, x, [*x.shape[:dim], *call["sizes"], *rest])


def _reordered(call: Call, order: Sequence[int]) -> Value:
    x = next(call.values())
    return call.make([x.ids[d] for d in order], [x.zero[d] for d in order])


@register_rule("permute", pure=True, view=True)
def permute(call: Call) -> Result:
    ndim = call["self"].ndim
    return _reordered(call, [dim % ndim for dim in call["dims"]])


@register_rule("transpose", "swapaxes", "swapdims", pure=True, view=True)
def transpose(call: Call) -> Result:
    ndim = call["self"].ndim
    first, second = [a for a in call.args.values() if isinstance(a, int)][:2]
    order = list(range(ndim))
    if ndim:
        order[first], order[second] = order[second], order[first]
    return _reordered(call, order)


@register_rule("t", "mT", "mH", "adjoint", pure=True, view=True)
def matrix_transpose(call: Call) -> Result:
    order = list(range(call["self"].ndim))
    return _reordered(call, [*order[:-2], *reversed(order[-2:])])


@register_rule("numpy_T", pure=True, view=True)
def full_transpose(call: Call) -> Result:
    return _reordered(call, list(reversed(range(call["self"].ndim))))


@register_rule("movedim", "moveaxis", pure=True, view=True)
def movedim(call: Call) -> Result:
    ndim = call["self"].ndim
    source, target = (
        [a % ndim] if isinstance(a, int) else [d % ndim for d in a]
        for a in (call["source"], call["destination"])
    )
    order = [d for d in range(ndim) if d not in source]
    for place, dim in sorted(zip(target, source, strict=True)):
        order.insert(place, dim)
    return _reordered(call, order)


@register_rule("unsqueeze", pure=True, view=True)
def unsqueeze(call: Call) -> Result:
    x = call["self"]
    dim = call["dim"] % (x.ndim + 1)
    ids, zero = list(x.ids), list(x.zero)
    ids.insert(dim, None)
    zero.insert(dim, None)
    return call.make(ids, zero)


@register_rule("squeeze", pure=True, view=True)
def squeeze(call: Call) -> Result:
    x, dims = call["self"], call.args.get("dim")
    listed = range(x.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % x.ndim for d in listed if x.shape[d % x.ndim] == 1} if x.ndim else set()
    kept = [d for d in range(x.ndim) if d not in gone]
    if dims is None:
        for ids in x.ids:
            # If one channel were left, the dimension would have size 1 and would be dropped.
            call.freeze(None if ids is None else ids[:2], f"{call.label} drops a dimension of size 1")
    return _reordered(call, kept)


@register_rule("expand_as", pure=True, view=True)
def expand_as(call: Call) -> Result:
    """An expanded dimension of size 1 takes the size of the other tensor, and its slots."""
    x, other = call["self"], call["other"]
    extra: list[None] = [None] * (other.ndim - x.ndim)
    ids, zero, sizes = [*extra, *x.ids], [*extra, *x.zero], [*(1 for _ in extra), *x.shape]
    for dim, size in enumerate(sizes):
        if size == 1 and other.ids[dim] is not None:
            ids[dim], zero[dim] = other.ids[dim], np.zeros(other.shape[dim], bool)
    return call.make(ids, zero)


@register_rule("expand", "broadcast_to", pure=True, view=True)
def expand(call: Call) -> Result:
    """The program names the size of an expanded dimension."""
    x = call["self"]
    extra: list[None] = [None] * (len(call.shape()) - x.ndim)
    return _widened(call, [*extra, *x.ids], [*extra, *x.zero])


def _widened(call: Call, ids: list[Ids], zero: list[Flags]) -> Value:
    """The output, with slots for dimensions that were of size 1. They hold the same values all along."""
    x, shape = next(call.values()), call.shape()
    before = [1] * (len(shape) - x.ndim) + list(x.shape)
    grown = [size if old == 1 else 1 for old, size in zip(before, shape, strict=True)]
    new = call.named(grown)
    if call.settled and any(own is not None for own in new):
        call.records.shaped.append(Shaped(call.module, x.shape, shape, tuple(new)))
    for dim, own in enumerate(new):
        if own is not None:
            ids[dim], zero[dim] = own, np.zeros(len(own), bool)
    return call.make(ids, zero)


@register_rule("repeat", "tile", pure=True)
def repeat(call: Call) -> Result:
    x = call["self"]
    times = list(call["repeats" if call.name == "repeat" else "dims"])
    ndim = len(call.shape())
    times = [1] * (ndim - len(times)) + times
    extra: list[None] = [None] * (ndim - x.ndim)
    ids = [None if i is None else np.tile(i, n) for i, n in zip([*extra, *x.ids], times, strict=True)]
    zero = [None if z is None else np.tile(z, n) for z, n in zip([*extra, *x.zero], times, strict=True)]
    return _widened(call, ids, zero)


@register_rule("repeat_interleave", pure=True)
def repeat_interleave(call: Call) -> Result:
    x, times, dim = call["self"], call["repeats"], call.args.get("dim")
    if isinstance(times, Value) or dim is None:
        return call.give_up(f"{call.label} repeats by a tensor or flattens")
    dim %= x.ndim
    ids, zero = list(x.ids), list(x.zero)
    if ids[dim] is not None:
        ids[dim] = np.repeat(ids[dim], times)
        zero[dim] = np.repeat(flags(zero[dim], x.shape[dim]), times)
    return call.make(ids, zero)


@register_rule("flip", pure=True)
def flip(call: Call) -> Result:
    x = call["self"]
    dims = {d % x.ndim for d in call["dims"]}
    ids = [i if i is None or d not in dims else i[::-1] for d, i in enumerate(x.ids)]
    zero = [z if z is None or d not in dims else z[::-1] for d, z in enumerate(x.zero)]
    return call.make(ids, zero)


@register_rule("roll", pure=True)
def roll(call: Call) -> Result:
    """A fixed shift moves other channels once some are removed, so the dimension is frozen."""
    x = call["self"]
    dims = {d % x.ndim for d in call["dims"]} or set(range(x.ndim))
    for dim in dims:
        call.freeze(x.ids[dim], f"{call.label} shifts it by a fixed number")
    ids = [None if d in dims else i for d, i in enumerate(x.ids)]
    zero = [None if d in dims else z for d, z in enumerate(x.zero)]
    return call.make(ids, zero)


@register_rule("channel_shuffle", "native_channel_shuffle", pure=True)
def channel_shuffle(call: Call) -> Result:
    """Equal positions of all groups are one channel. The result interleaves the groups."""
    x, groups = call["self"], call["groups"]
    ids, zero = list(x.ids), list(x.zero)
    if ids[1] is not None:
        table = ids[1].reshape(groups, -1)
        first = np.broadcast_to(table[:1], table.shape).ravel()
        call.slots.union(first, ids[1], f"{call.label} has equal groups")
        ids[1] = table.T.ravel()
        zero[1] = flags(zero[1], x.shape[1]).reshape(groups, -1).T.ravel()
    return call.make(ids, zero)


@register_rule("pixel_shuffle", pure=True)
def pixel_shuffle(call: Call) -> Result:
    """Each block of ``upscale_factor ** 2`` neighbouring channels becomes one channel."""
    x, block = call["self"], call["upscale_factor"] ** 2
    channel = x.ndim - 3
    ids, zero = list(x.ids), list(x.zero)
    _freeze_space(call, x, channel)
    if ids[channel] is not None:
        table = ids[channel].reshape(-1, block)
        first = np.repeat(table[:, 0], block)
        call.slots.union(first, ids[channel], f"{call.label} moves whole blocks")
        wide = math.prod(table.shape[:1]) > 1
        ids[channel] = table[:, 0] if wide else None
        truth = flags(zero[channel], x.shape[channel]).reshape(-1, block).all(axis=1)
        zero[channel] = truth if wide else None
        if not wide:
            call.freeze(table.ravel(), f"{call.label} makes a single channel of it")
    return call.make(ids, zero)


@register_rule("pixel_unshuffle", pure=True)
def pixel_unshuffle(call: Call) -> Result:
    x, block = call["self"], call["downscale_factor"] ** 2
    channel = x.ndim - 3
    ids, zero = list(x.ids), list(x.zero)
    _freeze_space(call, x, channel)
    if ids[channel] is not None:
        ids[channel] = np.repeat(ids[channel], block)
        zero[channel] = np.repeat(flags(zero[channel], x.shape[channel]), block)
    return call.make(ids, zero)


def _freeze_space(call: Call, x: Value, channel: int) -> None:
    for dim in (channel + 1, channel + 2):
        call.freeze(x.ids[dim], f"{call.label} reads it as space")
