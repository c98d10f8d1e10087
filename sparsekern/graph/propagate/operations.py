"""The ops that a network runs in a pass in evaluation mode, and the sizes of their operands."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from sparsekern.graph.propagate.values import Ids, Value


@dataclass(frozen=True)
class Operand:
    """A tensor that an op reads.

    Attributes:
        shape: sizes in the traced network.
        extents: per dimension the number of the extent (of the graph's ``costs``) that gives its size;
            None for a size that never changes.
        dtype: name of the dtype, such as ``float32``.
        order: dimensions from the outermost in memory to the innermost.
        source: name and output number of the operation that makes it; None for a parameter, buffer,
            constant or input of the network.
    """

    shape: tuple[int, ...]
    extents: tuple[int | None, ...]
    dtype: str
    order: tuple[int, ...]
    source: tuple[str, int] | None = None

    def sized(self, sizes: np.ndarray) -> tuple[int, ...]:
        """The shape for extents of the given ``sizes``, int64 [E]."""
        return tuple(
            size if extent is None else int(sizes[extent])
            for size, extent in zip(self.shape, self.extents, strict=True)
        )


@dataclass(frozen=True)
class Constant:
    """A dtype, layout, memory format or device among the arguments of an op.

    Attributes:
        name: as in ``torch.float32``; ``device`` for any device.
    """

    name: str


@dataclass(frozen=True, eq=False)
class Operation:
    """One op that the network runs.

    Attributes:
        name: name of its node in the traced graph.
        target: the op, such as ``aten::conv2d.default``.
        module: path of the module in whose forward it is called.
        args: positional arguments of the op. An ``Operand`` replaces every tensor, a ``Constant`` every
            other object of torch.
        kwargs: keyword arguments in the same form.
    """

    name: str
    target: str
    module: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def operands(self) -> Iterator[Operand]:
        """Iterate over the tensors that the op reads.

        Yields:
            Operands in the order of arguments, including those in lists.
        """
        yield from _operands((*self.args, *self.kwargs.values()))


def _operands(arguments: Any) -> Iterator[Operand]:
    for argument in arguments:
        if isinstance(argument, Operand):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _operands(argument)


@dataclass(frozen=True, eq=False)
class Read:
    """An operation before channels have numbers.

    Attributes:
        operation: the operation, without extents.
        ids: raw slot ids of each operand's dimensions, int64; None where nothing is tracked.
    """

    operation: Operation
    ids: tuple[tuple[Ids, ...], ...]

    def numbered(self, channel_of: np.ndarray, extent: Callable[[np.ndarray], int | None]) -> Operation:
        """Make the operation with extents.

        Args:
            channel_of: the channel of every slot, int64 ``[slots]``, -1 for slots that stay.
            extent: gives the number of the extent for the channel ids of a dimension.

        Returns:
            The operation.
        """
        left = iter(self.ids)

        def of(argument: Any) -> Any:
            if isinstance(argument, Operand):
                own = (None if i is None else extent(np.where(i >= 0, channel_of[i], -1)) for i in next(left))
                return replace(argument, extents=tuple(own))
            if isinstance(argument, (list, tuple)):
                return [of(item) for item in argument]
            return argument

        operation = self.operation
        args = tuple(of(argument) for argument in operation.args)
        kwargs = {name: of(argument) for name, argument in operation.kwargs.items()}
        return replace(operation, args=args, kwargs=kwargs)


def read(node: fx.Node, env: Mapping[fx.Node, Any], module: str) -> Read:
    """Read an operation from a node.

    Args:
        node: a call of an ATen op.
        env: the value of every earlier node.
        module: path of the module in whose forward the op is called.

    Returns:
        The operation with the slots of its operands.
    """
    ids: list[tuple[Ids, ...]] = []

    def operand(source: fx.Node) -> Any:
        value, traced = env[source], source.meta.get("val")
        if not isinstance(value, Value):
            return value
        dtype, order = "float32", tuple(range(value.ndim))
        if isinstance(traced, Tensor) and traced.ndim == value.ndim:
            dtype, order = str(traced.dtype).removeprefix("torch."), _memory_order(traced)
        ids.append(value.ids)
        return Operand(value.shape, (None,) * value.ndim, dtype, order, _source(source))

    args: Any = _plain(fx.node.map_arg(node.args, operand))
    kwargs: Any = {name: _plain(value) for name, value in fx.node.map_arg(node.kwargs, operand).items()}
    target: Any = node.target
    overload = target._schema.overload_name or "default"
    name = f"{target._schema.name}.{overload}"
    return Read(Operation(node.name, name, module, tuple(args), kwargs), tuple(ids))


def _plain(argument: Any) -> Any:
    """The argument with plain data in place of torch's objects, so that a graph holds only data."""
    if isinstance(argument, (list, tuple)):
        return [_plain(item) for item in argument]
    if isinstance(argument, (torch.dtype, torch.layout, torch.memory_format)):
        return Constant(str(argument))
    if isinstance(argument, torch.device):
        return Constant("device")
    return argument


def _source(node: fx.Node) -> tuple[str, int] | None:
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        made, number = node.args
        return (made.name, number) if isinstance(made, fx.Node) and isinstance(number, int) else None
    return node.name, 0


def _memory_order(tensor: Tensor) -> tuple[int, ...]:
    strides = [stride if isinstance(stride, int) else 0 for stride in tensor.stride()]
    # A dimension of size 1 may have any stride. It sorts last among equal strides, so that the order
    # of a channels-last tensor does not change.
    return tuple(sorted(range(tensor.ndim), key=lambda d: (strides[d], tensor.shape[d]), reverse=True))
