"""The interpreter, which runs a traced graph over slots in place of numbers."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sparsekern.graph.capture.program import CONSTANT, Captured, Registered
from sparsekern.graph.capture.record import contents
from sparsekern.graph.capture.unused import macs
from sparsekern.graph.propagate import constants
from sparsekern.graph.propagate.operations import read
from sparsekern.graph.propagate.records import Records, term
from sparsekern.graph.propagate.rules import RULES, Call, Rule
from sparsekern.graph.propagate.slots import Slots
from sparsekern.graph.propagate.values import Affine, Flags, Ids, Value, untracked
from sparsekern.graph.rescale import Rescale

_Environment = dict[fx.Node, Any]
_MOST_NUMBERS = 64


@dataclass
class Tracked:
    """A registered tensor with its slots.

    Attributes:
        entry: the parameter or buffer.
        ids: per dimension an int64 array of slot ids; None for a dimension of size 1.
        row_dim: the dimension of its rows; None if it is not known or there is none.
        sizes: attributes of the user's modules that count its indices; see ``TensorSlots``.
        rescale: how its values follow the number of its indices; see ``TensorSlots``.
    """

    entry: Registered
    ids: tuple[Ids, ...]
    row_dim: int | None = None
    sizes: tuple[tuple[str, int, int], ...] = ()
    rescale: Rescale | None = None

    def value(self, number: int, settled: bool, storage: int) -> Value:
        """Make the value that enters the graph for this tensor.

        Args:
            number: the tensor's number.
            settled: whether row dimensions are known. If not, every slice of a parameter counts as
                zero.
            storage: the value's storage number.

        Returns:
            A static value.
        """
        zero: list[Flags] = []
        for dim, ids in enumerate(self.ids):
            masked = self.entry.parameter and (not settled or dim == self.row_dim)
            zero.append(None if ids is None else np.full(len(ids), masked))
        untracked_reason = f"tied to {self.entry.names[0]}, which stays"
        return Value(
            self.entry.shape,
            self.ids,
            tuple(zero),
            self.entry.itemsize,
            untracked_reason,
            zero_broken_by=f"adding {self.entry.names[0]}",
            storage=storage,
            static=True,
            made_of=frozenset({number}),
            affine=Affine(number),
        )


@dataclass
class Interpreter:
    """Applies the rules to a graph, node by node.

    A first pass over all graphs finds which slots go together. A second, settled pass finds which
    slices are zero and records producers, consumers and costs.

    Attributes:
        tensors: the registered tensors, by number.
        slots: all slots.
        records: the records that the rules fill.
        settled: whether this is the second pass.
        exact: see ``Call``.
        follows: see ``Call``.
        interpretations: by module, the choices to take for its ambiguous splits; the first one (0) for a
            module that is absent.
    """

    tensors: Sequence[Tracked]
    slots: Slots
    records: Records
    settled: bool
    exact: bool = True
    follows: bool = True
    interpretations: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    _splits: Counter[str] = field(default_factory=Counter)
    _storage: int = field(default=0)
    _sharing: dict[int, list[tuple[_Environment, fx.Node]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.records.parameters = frozenset(n for n, t in enumerate(self.tensors) if t.entry.parameter)

    def run(self, graph: Captured) -> None:
        """Apply the rules to ``graph`` and freeze the slots that reach its outputs."""
        sources = graph.sources
        self._splits.clear()
        known: dict[int, Value] = {}

        def placeholder(node: fx.Node) -> Value:
            source = sources.get(node.name, CONSTANT)
            if isinstance(source, str):
                shape, itemsize = shapes(node)[0] if shapes(node) else ((), 1)
                made = untracked(shape, itemsize, source, self._next(), static=source == CONSTANT)
                return replace(made, numbers=_integers(graph.constants.get(node.name)))
            if node.users:
                self.records.read.add(source)
            if source not in known:
                known[source] = self.tensors[source].value(source, self.settled, self._next())
            return known[source]

        values = [placeholder(n) for n in graph.module.graph.nodes if n.op == "placeholder"]
        outputs = pytree.tree_leaves(self._walk(graph.module, values, graph.first and not graph.training))
        reasons = ["reaches an output of the network"] * (len(outputs) - len(graph.kept))
        reasons += [f"is kept as {where}, where a loss may read it" for where in graph.kept]
        for number, (value, reason) in enumerate(zip(outputs, reasons, strict=True)):
            # A static value on a module is a weight made anew in every forward. No loss reads it.
            remade = number >= len(outputs) - len(graph.kept) and isinstance(value, Value) and value.static
            if isinstance(value, Value) and not remade:
                self._leaves(value, reason)

    def _leaves(self, value: Value, reason: str) -> None:
        """Freeze every slot of a value that something unknown reads, for ``reason``."""
        for ids in value.ids:
            if ids is not None:
                self.slots.freeze(ids, reason)
        if value.average is not None:
            self.slots.freeze(value.average.ids, reason)
        for number in _weights(value):
            self.records.otherwise.setdefault(number, reason)

    def _next(self) -> int:
        self._storage += 1
        return self._storage

    def _walk(self, module: fx.GraphModule, inputs: Sequence[Any], counted: bool) -> Any:
        """Interpret the nodes of ``module`` and return its outputs as values."""
        env: _Environment = {}
        given = iter(inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "get_attr":
                env[node] = self._attribute(module, node)
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], env.__getitem__)
            else:
                env[node] = self._step(node, env, counted)
            self._made(node, env)
        return None

    def _made(self, node: fx.Node, env: _Environment) -> None:
        if self.settled:
            self.records.values[node] = env[node]
        values = env[node] if isinstance(env[node], (tuple, list)) else (env[node],)
        for storage in {value.storage for value in values if isinstance(value, Value)}:
            self._sharing.setdefault(storage, []).append((env, node))

    def _attribute(self, module: fx.GraphModule, node: fx.Node) -> Any:
        found = operator.attrgetter(str(node.target))(module)
        if isinstance(found, Tensor):
            shape, itemsize = tuple(found.shape), found.element_size()
            made = untracked(shape, itemsize, CONSTANT, self._next(), static=True)
            return replace(made, numbers=_integers(found))
        return found

    def _step(self, node: fx.Node, env: _Environment, counted: bool) -> Any:
        args: Any = fx.node.map_arg(node.args, env.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, env.__getitem__)
        if node.target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], (tuple, list)) else args[0]
        if not isinstance(node.target, torch._ops.OpOverload):
            return self._higher_order(node, [*args, *kwargs.values()], counted)
        schema = node.target._schema
        call = self._call(node, _bind(node.target, args, kwargs), counted)
        self.slots.step += 1
        before = len(self.records.macs)
        result = self._averaged(call, self._apply(call), in_place=schema.is_mutable)
        result = _mapped(result, partial(constants.carried, node, call.args, self.slots, self.records))
        self._splits[call.module] = call.splits
        if call.gave_up and self.settled and counted and len(self.records.macs) == before:
            # The cost is constant: nothing that enters an op without a rule is pruned.
            call.count_macs(macs(node))
        if self.settled and counted:
            self.records.operations.append(read(node, env, call.module))
        self._note(call, result, in_place=schema.is_mutable)
        if schema.is_mutable and isinstance(result, Value) and isinstance(node.args[0], fx.Node):
            return self._write(node.args[0], result, env)
        return result

    def _apply(self, call: Call) -> Any:
        """The rule's result. If the rule fails on unexpected arguments, the operands are frozen."""
        if any(size < 0 for shape, _ in call.outputs for size in shape):
            return call.give_up(f"{call.label} makes a tensor whose size depends on data")
        try:
            return call.rule.function(call)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            return call.give_up(f"{call.label} is not followed ({type(error).__name__}: {error})")

    def _averaged(self, call: Call, result: Any, *, in_place: bool) -> Any:
        """Carry the factors of means over channels on, or freeze the channels if the op cannot.

        A write in place may change values that share the memory, so it carries nothing on.
        """
        operands = list(call.values())
        averages = [value.average for value in operands if value.average is not None]
        if averages and (in_place or call.gave_up or not call.rule.averages):
            alone = len(operands) == 1 or call.name.endswith("_as")
            if call.rule.pure and alone and not in_place and not call.gave_up and operands[0].average:
                result = _mapped(result, lambda value: replace(value, average=operands[0].average))
            else:
                call.lose(*averages)
                result = _mapped(result, lambda value: replace(value, average=None))
        if call.rule.pure and len(operands) == 1 and not call.gave_up:
            result = _mapped(result, lambda value: replace(value, scale=operands[0].scale))
        if in_place:
            result = _mapped(result, lambda value: replace(value, affine=None, scale=None))
        carried = {number for value in _each(result) for number in _weights(value)} | call.made_up
        for value in operands:
            for number in _weights(value) - carried:
                self.records.otherwise.setdefault(number, call.label)
        return result

    def _call(self, node: fx.Node, args: dict[str, Any], counted: bool) -> Call:
        name, overload, rule = _rule(node.target)
        module = _module(node)
        return Call(
            name=name,
            overload=overload,
            module=module,
            args=args,
            outputs=shapes(node),
            slots=self.slots,
            records=self.records,
            rule=rule,
            settled=self.settled,
            counted=counted,
            exact=self.exact,
            follows=self.follows,
            interpretation=self.interpretations.get(module, ()),
            splits=self._splits[module],
            new_storage=self._next,
            node=node,
        )

    def _note(self, call: Call, result: Any, *, in_place: bool) -> None:
        """Record what all rules have in common: readers of producers' outputs, families and memory."""
        if not call.rule.pure and not call.rule.norm:
            for value in call.values():
                for number in value.pure:
                    self.records.producers[number].mixed = True
        if not all(value.static for value in call.values()):
            made = (value.made_of for value in call.values() if value.static)
            self.records.families.update(family for family in made if len(family) > 1)
        if in_place or call.rule.view or not (call.counted and self.settled):
            return
        for value in result if isinstance(result, tuple) else (result,):
            if isinstance(value, Value) and not value.static:
                factors = [
                    size if ids is None else ids for size, ids in zip(value.shape, value.ids, strict=True)
                ]
                self.records.activations.append(term(value.itemsize, factors, call.module))

    def _write(self, target: fx.Node, result: Value, env: _Environment) -> Value:
        """Record the result of an in-place op.

        If zeros are lost, every value that may share the memory loses its zeros, too.
        """
        before = env[target]
        result = replace(result, storage=before.storage)
        if any(_lost(a, b) for a, b in zip(before.zero, result.zero, strict=False)):
            for around, node in self._sharing.get(before.storage, ()):
                value = around[node]
                if isinstance(value, (tuple, list)):
                    around[node] = [_cleared(v, before.storage, result.zero_broken_by) for v in value]
                else:
                    around[node] = _cleared(value, before.storage, result.zero_broken_by)
        for around, node in self._sharing.get(before.storage, ()):
            for value in _each(around[node]):
                if value.storage == before.storage and value.average is not None:
                    self.slots.freeze(value.average.ids, value.average.reason)
        env[target] = result
        return result

    def _higher_order(self, node: fx.Node, args: list[Any], counted: bool) -> Any:
        """Interpret a region under autocast or a gradient mode; freeze the operands of other regions."""
        inner = [i for i, a in enumerate(args) if isinstance(a, fx.GraphModule)]
        if str(node.target).startswith("wrap_with_") and len(inner) == 1:
            return self._walk(args[inner[0]], args[inner[0] + 1 :], counted)
        reason = f"{node.target} has no rule"
        for value in pytree.tree_leaves(args):
            if isinstance(value, Value):
                self._leaves(value, reason)
        return tuple(untracked(s, i, reason, self._next()) for s, i in shapes(node))


def _weights(value: Value) -> set[int]:
    """Numbers of the tensors that a value is an affine function or a multiple of."""
    known = (value.affine, value.scale.weight if value.scale is not None else None)
    return {weight.tensor for weight in known if weight is not None}


def _integers(constant: Any) -> tuple[int, ...]:
    """The numbers in a small constant of integers; empty for anything else."""
    known = contents(constant) if isinstance(constant, Tensor) else None
    values = known[1] if known is not None and len(known[1]) <= _MOST_NUMBERS else ()
    return values if all(type(value) is int for value in values) else ()


def _each(made: Any) -> list[Value]:
    """The values among the results of an op."""
    return [v for v in (made if isinstance(made, (tuple, list)) else (made,)) if isinstance(v, Value)]


def _mapped(made: Any, change: Callable[[Value], Value]) -> Any:
    """The results of an op with every value changed."""
    if isinstance(made, (tuple, list)):
        return tuple(_mapped(value, change) for value in made)
    return change(made) if isinstance(made, Value) else made


def _cleared(value: Any, storage: int, op: str) -> Any:
    shares = isinstance(value, Value) and value.storage == storage
    return value.with_cleared_zeros(op) if shares else value


def _lost(before: Flags, after: Flags) -> bool:
    if before is None:
        return False
    return bool(before.any()) if after is None else bool((before & ~after).any())


def _no_rule(call: Call) -> Any:
    return call.give_up(f"{call.label} has no rule")


def _rule(target: Any) -> tuple[str, str, Rule]:
    """Name, overload and rule of an op. An in-place op without its own rule uses the plain op's rule."""
    name, overload = target._schema.name.removeprefix("aten::"), target._schema.overload_name
    plain = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    for key in (f"{name}.{overload}", name, f"{plain}.{overload}", plain):
        if key in RULES:
            return name, overload, RULES[key]
    return name, overload, Rule(_no_rule)


@cache
def _signature(target: Any) -> tuple[tuple[str, bool, Any], ...]:
    return tuple((a.name, a.has_default_value(), a.default_value) for a in target._schema.arguments)


def _bind(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound = {}
    for index, (name, has_default, default) in enumerate(_signature(target)):
        if index < len(args):
            bound[name] = args[index]
        elif name in kwargs or has_default:
            bound[name] = kwargs.get(name, default)
    return bound


def shapes(node: fx.Node) -> list[tuple[tuple[int, ...], int]]:
    """Find the shapes of the tensors that a node makes.

    Args:
        node: a node with fake results in ``meta["val"]``.

    Returns:
        (shape, bytes per element) of every tensor; -1 for a size that depends on data.
    """
    return [
        (tuple(size if isinstance(size, int) else -1 for size in t.shape), t.element_size())
        for t in pytree.tree_leaves(node.meta.get("val"))
        if isinstance(t, Tensor)
    ]


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""
