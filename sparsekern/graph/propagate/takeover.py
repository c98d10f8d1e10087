"""The layers whose bias, or the batch norm behind them, can take over the constants of masked channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import fx

from sparsekern.graph.groups import ConstantRead
from sparsekern.graph.propagate.expressions import UNKNOWN, named
from sparsekern.graph.propagate.interpret import Tracked
from sparsekern.graph.propagate.records import Records
from sparsekern.graph.propagate.values import Value

_LAYERS = ("linear", "conv1d", "conv2d", "conv3d")


def constant_reads(tensors: Sequence[Tracked], records: Records) -> tuple[ConstantRead, ...]:
    """Find the layers that can keep their outputs when a channel that is constant is masked.

    The constant times the summed column is added to the bias of the layer. Without a bias, it is subtracted
    from the running mean of a batch norm that alone reads the output. Next to zeros that pad a convolution,
    the constant has fewer taps, so the output still changes there.

    Args:
        tensors: the registered tensors.
        records: the records of the settled interpretation.

    Returns:
        The layers. A weight or a bias that is read twice in a mode has none.
    """
    names = [tensor.entry.names[0] for tensor in tensors]
    known = tuple(named(expression, names.__getitem__) for expression in records.expressions.known)
    found: dict[str, ConstantRead | None] = {}
    for node, values in records.constant_reads:
        read = _read(node, values, records, names, known)
        if read is None:
            continue
        other = found.setdefault(read.weight, read)
        if other is not None and not _alike(read, other):
            found[read.weight] = None
    reads = [read for read in found.values() if read is not None]
    targets = [read.target for read in reads]
    return tuple(read for read in reads if targets.count(read.target) == 1)


def _read(
    node: fx.Node, values: np.ndarray, records: Records, names: list[str], known: tuple[Any, ...]
) -> ConstantRead | None:
    schema = node.target._schema  # type: ignore[union-attr]
    if schema.name.removeprefix("aten::") not in _LAYERS or (values == UNKNOWN).all():
        return None
    given = _arguments(node)
    weight = _single(given.get("weight"), records)
    if weight is None or given.get("groups", 1) != 1:
        return None
    target, sign = _single(given.get("bias"), records), 1.0
    if given.get("bias") is None:
        target, sign = _running_mean(node, records), -1.0
    return None if target is None else ConstantRead(names[weight], values, known, names[target], sign)


def _running_mean(node: fx.Node, records: Records) -> int | None:
    """The running mean of the batch norm that is the only reader of a layer's output."""
    users = list(node.users)
    if len(users) != 1 or getattr(users[0].target, "__name__", "").partition(".")[0] != "batch_norm":
        return None
    return _single(_arguments(users[0]).get("running_mean"), records)


def _single(node: Any, records: Records) -> int | None:
    """The number of a parameter or buffer that only one op reads."""
    value = records.values.get(node) if isinstance(node, fx.Node) else None
    if not isinstance(value, Value) or node.op != "placeholder" or len(node.users) != 1:
        return None
    return None if value.affine is None else value.affine.tensor


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an op by name, without defaults."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _alike(read: ConstantRead, other: ConstantRead) -> bool:
    same = np.array_equal(read.values, other.values)
    return same and (read.target, read.sign) == (other.target, other.sign)
