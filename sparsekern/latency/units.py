"""Ops grouped as runtimes fuse them, exported together to ONNX once, and run alone at any widths."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsekern.graph.propagate.operations import Operand, Operation
from sparsekern.latency.calls import Call
from sparsekern.runtimes.onnx_file import onnx_model

# Layers, by the beginning of the op's name, that runtimes fuse with the norm and activations after them.
_LAYERS = ("aten::conv", "aten::linear", "aten::addmm", "aten::matmul")
_FOLLOWING = [
    "batch_norm",
    "elu",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "relu",
    "relu6",
    "sigmoid",
    "silu",
    "tanh",
]
_SHAPE = re.compile(r"\[[\dx]*\]@")
_CPU = torch.device("cpu")


class Unit:
    """A layer with the norm and activation that alone read its result, or a single op, at given sizes.

    Args:
        operations: the operations in their order.
        sizes: int64 ``[E]``, sizes of the network's extents.

    Attributes:
        key: text of ops and arguments, which determine the time on a given machine.
        kind: the key without the shapes of tensors.
        elements: number of elements of all tensors that the first op reads.
    """

    def __init__(self, operations: Sequence[Operation], sizes: np.ndarray) -> None:
        self._calls = [Call(_out_of_place(operation), sizes) for operation in operations]
        self._sizes = sizes
        self.key = " > ".join(call.key for call in self._calls)
        self.kind = _SHAPE.sub("@", self.key)
        self.elements = self._calls[0].elements

    def inputs(self) -> Iterator[tuple[Operand, bool]]:
        """The tensors that come from outside, each with whether it is a weight of the network."""
        for number, call in enumerate(self._calls):
            for index, operand in enumerate(call.operation.operands()):
                if not self._is_inside(number, operand):
                    yield operand, operand.source is None and (number > 0 or index > 0)

    def tensors(self) -> list[Tensor]:
        """Generated tensors for ``inputs`` on the CPU; exported models have no memory formats."""
        return [self._calls[0].tensor(operand, _CPU).contiguous() for operand, _ in self.inputs()]

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of ``inputs``."""
        return [operand.sized(self._sizes) for operand, _ in self.inputs()]

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that the last op returns for the given ``inputs``.

        Raises:
            RuntimeError: torch does not have an op. One of ``FAILURES``: an op does not take these sizes.
        """
        left, result = iter(tensors), None
        for number, call in enumerate(self._calls):

            def tensor(operand: Operand, number: int = number, result: Any = result) -> Tensor:
                return result if self._is_inside(number, operand) else next(left)

            args, kwargs = call.arguments(tensor, _CPU)
            result = call.function()(*args, **kwargs)
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]

    def _is_inside(self, number: int, operand: Operand) -> bool:
        """Whether the operand of call ``number`` is the result of the call before it."""
        return number > 0 and operand.source == (self._calls[number - 1].operation.name, 0)


def group_operations(operations: Sequence[Operation]) -> dict[int, list[Operation]]:
    """The operations of every unit by the number of its first one.

    Operations inside a unit have no entry of their own. An operation belongs to the unit before it if nothing
    else reads the result of that unit.
    """
    readers: dict[str, list[int]] = {}
    for number, operation in enumerate(operations):
        for operand in operation.operands():
            if operand.source is not None:
                readers.setdefault(operand.source[0], []).append(number)
    found: dict[int, list[Operation]] = {}
    inside: set[int] = set()
    for number, operation in enumerate(operations):
        if number in inside:
            continue
        unit = found[number] = [operation]
        if not operation.target.startswith(_LAYERS):
            continue
        while len(after := readers.get(unit[-1].name, [])) == 1 and _follows(operations[after[0]]):
            inside.add(after[0])
            unit.append(operations[after[0]])
    return found


def _follows(operation: Operation) -> bool:
    name = operation.target.removeprefix("aten::").partition(".")[0].removesuffix("_")
    return name in _FOLLOWING


def _out_of_place(operation: Operation) -> Operation:
    """The operation without writing into its operand, which an exported model cannot do."""
    name, dot, overload = operation.target.partition(".")
    plain = name.removesuffix("_")
    packet = getattr(torch.ops.aten, plain.removeprefix("aten::"), None)
    if plain == name or not name.startswith("aten::") or packet is None or overload not in packet.overloads():
        return operation
    return replace(operation, target=f"{plain}{dot}{overload}")


class Models:
    """ONNX models of units.

    Args:
        units: units at all sizes that :meth:`model` is called with.
        shared: whether units of one kind share an export, with other shapes filled in. An exported op that
            names the sizes of its result then fails at other sizes.
    """

    def __init__(self, units: Sequence[Unit], *, shared: bool = True) -> None:
        self._shared = shared
        first = {self._name(unit): unit for unit in units}
        self._parts: dict[str, Any] = dict(_exported(list(first.items())))

    def _name(self, unit: Unit) -> str:
        return unit.kind if self._shared else unit.key

    def model(self, unit: Unit) -> tuple[bytes, dict[str, np.ndarray]] | None:
        """The model of a unit and its inputs by name; None if it cannot be exported."""
        from onnx import helper, numpy_helper

        part = self._parts.get(self._name(unit))
        if part is None:
            return None
        model, arrays = part(), {}
        del model.graph.input[:]
        for number, ((operand, is_weight), shape) in enumerate(
            zip(unit.inputs(), unit.shapes(), strict=True)
        ):
            name, values = f"i{number}", values_of(operand, shape)
            if is_weight:
                model.graph.initializer.append(numpy_helper.from_array(values, name))
                continue
            arrays[name] = values
            kind = helper.np_dtype_to_tensor_dtype(values.dtype)
            model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
        return model.SerializeToString(), arrays


def values_of(operand: Operand, shape: tuple[int, ...]) -> np.ndarray:
    """Values for an operand: in [0.5, 1.5) for numbers, so that none overflow; 0 for indices."""
    kind = np.dtype(operand.dtype)
    if kind.kind == "f":
        return np.random.default_rng(0).uniform(0.5, 1.5, shape).astype(kind)
    return np.full(shape, kind.kind == "b", kind)


class _Together(nn.Module):
    """All units side by side."""

    def __init__(self, units: Sequence[Unit]) -> None:
        super().__init__()
        self._units = units
        self._counts = [len(unit.shapes()) for unit in units]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        begin = 0
        for unit, count in zip(self._units, self._counts, strict=True):
            outputs += unit.run(tensors[begin : begin + count])
            begin += count
        return tuple(outputs)


def _exported(units: list[tuple[str, Unit]]) -> Iterator[tuple[str, Any]]:
    """For every unit that can be exported, its key and a function that makes its model without inputs.

    One export of all units takes little longer than one of a single unit. If it fails, halves are tried.
    """
    if not units:
        return
    try:
        yield from _export([key for key, _ in units], [unit for _, unit in units])
    except Exception:
        # The exporter raises errors of many classes for ops that it does not know.
        if len(units) > 1:
            middle = len(units) // 2
            yield from _exported(units[:middle])
            yield from _exported(units[middle:])


def _export(keys: Sequence[str], units: Sequence[Unit]) -> list[tuple[str, Any]]:
    with torch.inference_mode(False), torch.no_grad():
        tensors = [unit.tensors() for unit in units]
        counts = [len(unit.run(own)) for unit, own in zip(units, tensors, strict=True)]
        inputs = [[f"u{n}_i{k}" for k in range(len(own))] for n, own in enumerate(tensors)]
        outputs = [[f"u{n}_o{k}" for k in range(count)] for n, count in enumerate(counts)]
        model = onnx_model(
            _Together(units).eval(),
            tuple(tensor for own in tensors for tensor in own),
            {},
            inputs=[name for own in inputs for name in own],
            outputs=[name for own in outputs for name in own],
        )
    made = {name: number for number, node in enumerate(model.graph.node) for name in node.output}
    constants = {entry.name: entry for entry in model.graph.initializer}
    return [
        (key, lambda i=ins, o=outs: _part(model, made, constants, i, o))
        for key, ins, outs in zip(keys, inputs, outputs, strict=True)
    ]


def _part(
    model: Any,
    made: Mapping[str, int],
    constants: Mapping[str, Any],
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> Any:
    """The part of an ``onnx.ModelProto`` that computes ``outputs``, with its inputs renamed to i0, i1, ..."""
    from onnx import helper

    wanted, names, numbers = list(outputs), set[str](), set[int]()
    while wanted:
        name = wanted.pop()
        names.add(name)
        if name in made and made[name] not in numbers:
            numbers.add(made[name])
            wanted += model.graph.node[made[name]].input
    renamed = {name: f"i{number}" for number, name in enumerate(inputs)}
    nodes = []
    for number in sorted(numbers):
        node = type(model.graph.node[number])()
        node.CopyFrom(model.graph.node[number])
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)
        nodes.append(node)
    return helper.make_model(
        helper.make_graph(
            nodes,
            "unit",
            [],
            [helper.make_empty_tensor_value_info(name) for name in outputs],
            [constants[name] for name in sorted(names) if name in constants],
        ),
        opset_imports=model.opset_import,
        functions=model.functions,
        ir_version=model.ir_version,
    )
