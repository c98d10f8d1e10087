"""What a network runs: the ops of a pass in evaluation mode, and how large their operands are."""

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

    shape: its sizes in the network as it is. extents: per dimension the number of the extent (of the
    graph's ``costs``) that is its size, None for a size that never changes. dtype: such as
    ``float32``. order: its dimensions from the outermost in memory to the innermost. source: name
    and output number of the operation that made it, None for a parameter, buffer, constant or input
    of the network.
    """

    shape: tuple[int, ...]
    extents: tuple[int | None, ...]
    dtype: str
    order: tuple[int, ...]
    source: tuple[str, int] | None = None

    def sized(self, sizes: np.ndarray) -> tuple[int, ...]:
        """Its shape when the extents have the ``sizes``, int64 [E]."""
        return tuple(
            size if extent is None else int(sizes[extent])
            for size, extent in zip(self.shape, self.extents, strict=True)
        )


@dataclass(frozen=True)
class Constant:
    """A dtype, layout or memory format, ``name`` as in ``torch.float32``, or ``device`` for any device."""

    name: str


@dataclass(frozen=True, eq=False)
class Operation:
    """One op: ``target`` as in ``aten::conv2d.default``, called in the forward of ``module``.

    name: its own in the traced graph. args, kwargs: as the op takes them, with an ``Operand`` in
    the place of every tensor and a ``Constant`` in that of every object of torch.
    """

    name: str
    target: str
    module: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def operands(self) -> Iterator[Operand]:
        """The tensors it reads, those in lists included."""
        yield from _operands((*self.args, *self.kwargs.values()))


def _operands(arguments: Any) -> Iterator[Operand]:
    for argument in arguments:
        if isinstance(argument, Operand):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _operands(argument)


@dataclass(frozen=True, eq=False)
class Read:
    """An operation before channels have numbers. ids: raw slot ids of each operand's dimensions."""

    operation: Operation
    ids: tuple[tuple[Ids, ...], ...]

    def numbered(self, channel_of: np.ndarray, extent: Callable[[np.ndarray], int | None]) -> Operation:
        """The operation, with the extent that ``extent`` gives for the channels of a dimension."""
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
    """What ``node`` calls, with the values of ``env`` as operands."""
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
    """The argument without objects of torch, so that a graph is data and nothing else."""
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
    # A dimension of size 1 may have any stride; last among equals it leaves channels last what it is.
    return tuple(sorted(range(tensor.ndim), key=lambda d: (strides[d], tensor.shape[d]), reverse=True))
