"""Channels that are not zero while they are masked, and the columns that are masked with them.

A function such as ``sigmoid``, or an added number, turns the zeros of a masked channel into a constant. The
layer that reads the channel does not see it if the columns of its weight for this channel are zero, too. The
same holds where tensors without channels make it depend on the input, such as the values that heads share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx

from sparsekern.graph.propagate.expressions import UNKNOWN, ZERO
from sparsekern.graph.propagate.records import Records
from sparsekern.graph.propagate.slots import Slots
from sparsekern.graph.propagate.values import Constant, Flags, Value

_QUOTIENTS = frozenset(("div", "true_divide", "divide"))
_JOINS = frozenset(("cat", "concat", "concatenate", "stack"))

# In the ops below, each slice of the result is computed from slices of the same channel alone.
_FUNCTIONS = """
relu leaky_relu relu6 rrelu silu hardswish gelu tanh mish elu selu celu softshrink hardshrink sign sin sinh
tan asin atan asinh erf expm1 log1p floor ceil round trunc frac sigmoid hardsigmoid exp exp2 cos cosh
log_sigmoid softplus erfc acos hardtanh clamp clip clamp_min clamp_max threshold prelu glu sqrt square neg
negative abs absolute pow add sub rsub subtract mul multiply div true_divide divide maximum minimum fmax fmin
addcmul eq ne lt le gt ge logical_and logical_or logical_xor logical_not where masked_fill batch_norm
instance_norm dropout feature_dropout
softmax log_softmax matmul bmm baddbmm scaled_dot_product_attention
"""
_OVER_SPACE = """
mean sum amax amin var std max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d
upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d reflection_pad1d reflection_pad2d
reflection_pad3d replication_pad1d replication_pad2d replication_pad3d constant_pad_nd pad im2col
"""
_MOVES = """
contiguous clone alias to _to_copy detach type_as lift_fresh_copy lift_fresh view reshape _unsafe_view
flatten reshape_as view_as unflatten permute transpose swapaxes swapdims t mT numpy_T movedim moveaxis
unsqueeze squeeze expand broadcast_to repeat tile flip channel_shuffle native_channel_shuffle pixel_shuffle
pixel_unshuffle chunk split split_with_sizes tensor_split slice narrow select unbind
"""
_KEEPS = """
dropout feature_dropout mean amax amin max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d
adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d
upsample_trilinear3d reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
replication_pad3d
"""
_KEEPS_VALUE = _JOINS.union(_MOVES.split(), _KEEPS.split())
# The dimensions that an op sums over. A channel along them adds zeros, or else the rule of the op freezes it.
_SUMS_OVER: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "scaled_dot_product_attention": {"query": (-1, -2), "key": (-1, -2), "value": (-2,)},
    "matmul": {"self": (-1,), "other": (-2,)},
    "bmm": {"self": (-1,), "mat2": (-2,)},
    "baddbmm": {"batch1": (-1,), "batch2": (-2,)},
}
_HAS_STATE = frozenset(("batch_norm", "instance_norm"))
_CHANNELWISE = _JOINS.union(_FUNCTIONS.split(), _OVER_SPACE.split(), _MOVES.split())


def carried(node: fx.Node, args: Mapping[str, Any], slots: Slots, records: Records, result: Value) -> Value:
    """Find which slices of a result columns can be masked for, because no other channel has a part in them.

    The op computes such a slice from zeros, from such slices of the same channel, from values without
    channels and from static values alone. Where its value is known, it is a constant.
    Slices are followed along a single dimension that holds channels: with two of them, a slice along one
    dimension holds channels of the other.

    Args:
        node: the op in the traced graph.
        args: its arguments by name.
        slots: all slots; those of the operands and the result are tied already.
        records: receives the expressions of the constants.
        result: what the op makes.

    Returns:
        The result with its constant slices.
    """
    name = _plain_name(node)
    dim = _only_dim(result, slots)
    if name not in _CHANNELWISE or dim is None or result.static or _divides(name, args):
        return _with(result, None)
    ids, zero = result.ids[dim], result.zero[dim]
    if ids is None or zero is None or zero.all():
        return _with(result, None)
    left = {key: _without(args[key], dims) for key, dims in _SUMS_OVER.get(name, {}).items()}
    moving = [value for value in _values({**args, **left}) if not value.static]
    roots = slots.find(ids)
    constant = _constant_in_all(roots, slots, moving, joined=name in _JOINS)
    if constant is None or not (constant & ~zero).any():
        return _with(result, None)
    origins = frozenset[int]().union(*(v.origins for v in moving), *(_origins(v) for v in moving))
    made = np.where(zero, ZERO, np.where(constant, _made(node, args, slots, records, moving, roots), UNKNOWN))
    return _with(result, Constant(dim, constant | zero, origins, made))


def _plain_name(node: fx.Node) -> str:
    """The name of an op that is known here; that of the op out of place for one in place."""
    name = str(node.target._schema.name).removeprefix("aten::")  # type: ignore[union-attr]
    return name if name in _CHANNELWISE else name.removesuffix("_")


def _made(
    node: fx.Node,
    args: Mapping[str, Any],
    slots: Slots,
    records: Records,
    moving: Sequence[Value],
    roots: np.ndarray,
) -> np.ndarray:
    """The numbers of the expressions of a result's slices, int64; see ``carried`` for the arguments."""
    name = _plain_name(node)
    columns = [_values_of(value, slots, roots) for value in moving]
    if name in _JOINS:
        return np.max(columns, axis=0)
    if name in _KEEPS_VALUE and len(columns) == 1:
        return columns[0]
    if name in {*_OVER_SPACE.split(), *_MOVES.split(), *_HAS_STATE, *_SUMS_OVER}:
        return np.full(len(roots), UNKNOWN)
    schema = node.target._schema  # type: ignore[union-attr]
    op = f"{schema.name.removesuffix('_')}.{schema.overload_name}"
    distinct, which = np.unique(np.stack(columns), axis=1, return_inverse=True)
    pairs = ([(v, int(n)) for v, n in zip(moving, numbers, strict=True)] for numbers in distinct.T)
    return np.array([records.expressions.apply(op, args, p) for p in pairs])[which.reshape(-1)]


def _values_of(value: Value, slots: Slots, roots: np.ndarray) -> np.ndarray:
    """The numbers of the expressions of the channels ``roots``; ``UNKNOWN`` where slices of one differ."""
    dim = _only_dim(value, slots)
    ids = None if dim is None else value.ids[dim]
    if dim is None or ids is None:
        return np.full(len(roots), UNKNOWN)
    known = np.full(len(ids), UNKNOWN) if value.constant is None else value.constant.values
    zero = value.zero[dim]
    known = known if zero is None else np.where(zero, ZERO, known)
    found, which = np.unique(slots.find(ids), return_inverse=True)
    low, high = np.full(len(found), np.iinfo(np.int64).max), np.full(len(found), UNKNOWN)
    np.minimum.at(low, which.reshape(-1), known)
    np.maximum.at(high, which.reshape(-1), known)
    at = np.minimum(np.searchsorted(found, roots), len(found) - 1)
    return np.where((found[at] == roots) & (low == high)[at], low[at], UNKNOWN)


def _divides(name: str, args: Mapping[str, Any]) -> bool:
    """Whether the op divides by activations. Their constant may be 0, and infinity times 0 is not 0."""
    if name == "pow":
        exponent = args["exponent"]
        return not isinstance(exponent, (int, float)) or exponent < 0
    below = args.get("other") if name in _QUOTIENTS else None
    inverted = name in _QUOTIENTS and not isinstance(args["self"], Value)
    return inverted or (isinstance(below, Value) and not below.static)


def _without(value: Value, dims: Sequence[int]) -> Value:
    """The value without the slots of some dimensions."""
    gone = {dim % value.ndim for dim in dims if -dim <= value.ndim}
    ids = tuple(None if dim in gone else own for dim, own in enumerate(value.ids))
    zero = tuple(None if dim in gone else own for dim, own in enumerate(value.zero))
    return replace(value, ids=ids, zero=zero)


def _values(args: Mapping[str, Any]) -> list[Value]:
    """The tensors among the arguments, including those in lists."""
    each = (a if isinstance(a, (list, tuple)) else (a,) for a in args.values())
    return [value for some in each for value in some if isinstance(value, Value)]


def _constant_in_all(
    roots: np.ndarray, slots: Slots, operands: Sequence[Value], *, joined: bool
) -> np.ndarray | None:
    """Which of the channels ``roots`` are zero or constant in all operands, bool; None if it is not known.

    An operand without channels has a part in all slices alike. One that is ``joined`` with others and does
    not have a channel has no part in its slice.
    """
    constant = roots >= 0
    for value in operands:
        dims = _dims(value, slots)
        if not dims:
            continue
        if len(dims) > 1:
            return None
        own, still = value.ids[dims[0]], _still(value, dims[0])
        assert own is not None
        theirs = slots.find(own)
        constant &= ~np.isin(roots, theirs[~still])
        if not joined:
            constant &= np.isin(roots, theirs)
    return constant


def mask_columns(
    records: Records,
    value: Value,
    dim: int,
    weight: Value,
    columns: np.ndarray,
    node: fx.Node,
    *,
    settled: bool,
) -> Flags:
    """Find the channels that a layer reads as nothing, and record the columns that have to be masked for it.

    Args:
        records: the records.
        value: the activations.
        dim: the dimension that the layer sums over.
        weight: the weight. Columns are masked only in a parameter itself, not in what is computed from one.
        columns: raw slot ids of its columns, one for each channel.
        node: the layer in the traced graph.
        settled: whether zero flags are facts, see ``Call``.

    Returns:
        Which channels are zero or are read by columns that are masked with them, bool.
    """
    source, constant, zero = weight.affine, value.constant, value.zero[dim]
    if zero is None or constant is None or source is None or constant.dim != dim % value.ndim:
        return zero
    if source.tensor not in records.parameters or (source.factor, source.offset) != (1.0, 0.0):
        return zero
    for producer in constant.origins:
        records.producers[producer].consumed = True
    if settled:
        records.masked_columns.append(columns[constant.flags & ~zero])
        records.constant_reads.append((node, constant.values))
    return zero | constant.flags


def _only_dim(value: Value, slots: Slots) -> int | None:
    """The dimension that holds channels, if there is exactly one."""
    dims = _dims(value, slots)
    return dims[0] if len(dims) == 1 else None


def _dims(value: Value, slots: Slots) -> list[int]:
    """The dimensions with slots of which some may go."""
    return [dim for dim, ids in enumerate(value.ids) if ids is not None and slots.may_go(ids)]


def _still(value: Value, dim: int) -> np.ndarray:
    """Which slices along the only dimension that holds channels are zero or constant, bool."""
    zero = value.zero[dim]
    flags = np.zeros(value.shape[dim], bool) if zero is None else zero
    return flags if value.constant is None else flags | value.constant.flags


def _origins(value: Value) -> frozenset[int]:
    return frozenset() if value.constant is None else value.constant.origins


def _with(value: Value, constant: Constant | None) -> Value:
    return value if value.constant is constant else replace(value, constant=constant)
