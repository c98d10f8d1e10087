"""Records of a run: its ATen ops in order, without an exported graph.

A record costs a tenth of an export. It lists the ops before autograd and before composite ops are taken
apart, as an export does, so that records of two runs, and a record and an exported graph, can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, PythonKeyTracer
from torch.utils import _pytree as pytree

# A tensor: ("tensor", number), ("input", number), ("constant", contents) or (step, output).
Origin = tuple[Any, ...]

# These return their operand if nothing has to be done, and then leave no op behind.
_COPIES = frozenset({"aten::contiguous", "aten::clone"})
# Arguments that differ between the modes of one program, by name.
_OF_MODE = frozenset({"train", "training", "dropout_p"})
_QUICK = frozenset(
    {torch.ops.aten.batch_norm.default, torch.ops.aten.layer_norm.default, torch.ops.aten.linear.default}
)
_LARGEST_CONSTANT = 1 << 16


class Step(NamedTuple):
    """An op of a run.

    Attributes:
        target: the op, or "output".
        sources: where its tensor operands come from.
        numbers: the arguments that are values, not sizes or positions.
        shapes: sizes of the tensors that it makes; -1 stands for a size that depends on data.
        plain: all arguments but tensors, by name.
        node: the node of the exported graph; None if there is none.
    """

    target: Any
    sources: tuple[Origin, ...]
    numbers: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]
    plain: tuple[tuple[str, Any], ...] = ()
    node: fx.Node | None = None


@dataclass
class Record:
    """The ops of a run.

    Attributes:
        steps: the ops in order; the output comes last.
        written: the steps that are copies which have to be told apart from their operands, because one of
            the two is written to.
    """

    steps: list[Step] = field(default_factory=list)
    written: frozenset[int] = frozenset()


class Recorder(ProxyTorchDispatchMode):
    """A dispatch mode that records ops where an export would.

    Args:
        tensors: numbers of the registered tensors, by ``id``.
        inputs: the tensors of the inputs.
    """

    def __init__(self, tensors: Mapping[int, int], inputs: Sequence[Tensor]) -> None:
        super().__init__(PythonKeyTracer(), "real", pre_dispatch=True)
        self._origins: dict[int, Origin] = {key: ("tensor", number) for key, number in tensors.items()}
        self._origins |= {id(tensor): ("input", number) for number, tensor in enumerate(inputs)}
        # torch returns a shallow copy of a tensor that a factory makes. It has the same memory.
        self._by_memory: dict[tuple[int, tuple[int, ...]], Origin] = {}
        self._steps: list[Step] = []
        # The results keep their ids as long as they live.
        self._held: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        sources = tuple(self._origin(leaf) for leaf in leaves)
        result = _made_quickly(func, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
        if isinstance(func, torch._ops.OpOverload):
            self._add(func, sources, args, kwargs, result)
        return result

    def __sym_dispatch__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def _add(self, func: Any, sources: tuple[Origin, ...], args: Any, kwargs: Any, result: Any) -> None:
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        for number, tensor in enumerate(made):
            self._origins[id(tensor)] = len(self._steps), number
            if tensor.layout is torch.strided and (not sources or func._schema.name.endswith("_like")):
                self._by_memory[_memory(tensor)] = len(self._steps), number
        self._held += made
        numbers = tuple(numbers_of(func, args, kwargs))
        shapes = tuple(sizes(tensor) for tensor in made)
        self._steps.append(Step(func, sources, numbers, shapes, _plain(func, args, kwargs)))

    def _origin(self, tensor: Tensor) -> Origin:
        known = self._origins.get(id(tensor))
        if known is None:
            self._held.append(tensor)
            known = self._by_memory.get(_memory(tensor))
            known = known or ("constant", sizes(tensor), contents(tensor))
            self._origins[id(tensor)] = known
        return known

    def record(self, output: Any) -> Record:
        """Finish: the record of the ops that reach ``output`` or write to a tensor."""
        leaves = pytree.tree_leaves(output)
        sources = tuple(self._origin(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        numbers = tuple(leaf for leaf in leaves if type(leaf) in (int, float))
        steps = [*self._steps, Step("output", sources, numbers, ())]
        return Record(steps, written_copies(steps))


def _memory(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """The address of a dense tensor's storage, and its sizes; 0 for the address of any other tensor."""
    dense = tensor.layout is torch.strided
    return tensor.untyped_storage()._cdata if dense else 0, sizes(tensor)


def _made_quickly(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The result of a layer on fake tensors, which torch finds by slow decompositions.

    Returns:
        The result; None for other ops, and where torch may refuse the operands.
    """
    tensors = [argument for argument in args if isinstance(argument, Tensor)]
    if func not in _QUICK or kwargs or not all(type(tensor) is FakeTensor for tensor in tensors):
        return None
    x = tensors[0]
    if x.ndim < 2 or any((t.dtype, t.device) != (x.dtype, x.device) for t in tensors[1:]):
        return None
    others = [tuple(t.shape) for t in tensors[1:]]
    if func is torch.ops.aten.batch_norm.default:
        fits = set(others) <= {(x.shape[1],)} and (args[5] or args[3] is not None)
        return torch.empty_like(x) if fits else None
    if func is torch.ops.aten.layer_norm.default:
        fits = set(others) <= {tuple(args[1])} and tuple(x.shape[-len(args[1]) :]) == tuple(args[1])
        return torch.empty_like(x, memory_format=torch.contiguous_format) if fits else None
    rows, columns = others[0] if len(others[0]) == 2 else (0, 0)
    fits = columns == x.shape[-1] and others[1:] in ([], [(rows,)])
    return x.new_empty((*x.shape[:-1], rows)) if fits else None


def live(record: Record, copies: bool = False) -> list[Step]:
    """The ops that reach the output or write to a tensor, with sources numbered among them.

    Args:
        record: a record.
        copies: whether all copies count as ops. Otherwise a copy is the same as its operand, unless one of
            the two is written to.
    """
    needed: set[int] = set()
    for number in range(len(record.steps) - 1, -1, -1):
        step = record.steps[number]
        if number in needed or _has_effect(step):
            needed.add(number)
            needed.update(s[0] for s in step.sources if isinstance(s[0], int))
    found: list[Step] = []
    origins: dict[Origin, Origin] = {}
    for number, step in enumerate(record.steps):
        if number not in needed:
            continue
        sources = tuple(origins.get(source, source) for source in step.sources)
        if not copies and number not in record.written and _is_copy(step):
            origins[number, 0] = sources[0]
            continue
        for output in range(len(step.shapes)):
            origins[number, output] = len(found), output
        found.append(step._replace(sources=sources))
    return found


def _has_effect(step: Step) -> bool:
    return not isinstance(step.target, torch._ops.OpOverload) or step.target._schema.is_mutable


def _is_copy(step: Step) -> bool:
    if not isinstance(step.target, torch._ops.OpOverload) or len(step.sources) != 1:
        return False
    return step.target._schema.name in _COPIES


def written_copies(steps: Sequence[Step]) -> frozenset[int]:
    """The copies of which an op writes to the memory that is copied, or to the copy.

    Views share memory with their operand; every op that may make one counts.
    """
    family: dict[Origin, Origin] = {}
    copied: dict[int, Origin] = {}
    written: set[Origin] = set()
    for number, step in enumerate(steps):
        if not isinstance(step.target, torch._ops.OpOverload):
            continue
        sources = [family.get(source, source) for source in step.sources]
        schema = step.target._schema
        if schema.is_mutable and sources:
            written.add(sources[0])
        if _is_copy(step):
            copied[number] = sources[0]
        if sources and (_is_copy(step) or schema.is_mutable or _may_be_view(step.target)):
            for output in range(len(step.shapes)):
                family[number, output] = sources[0]
    return frozenset(number for number, source in copied.items() if source in written)


@cache
def _may_be_view(target: torch._ops.OpOverload) -> bool:
    aliases = any(value.alias_info is not None for value in target._schema.returns)
    return aliases or target._schema.name in ("aten::reshape", "aten::flatten", "aten::to")


def sizes(tensor: Tensor) -> tuple[int, ...]:
    """The sizes of a tensor; -1 for one that depends on data."""
    return tuple(size if type(size) is int else -1 for size in tensor.shape)


def contents(tensor: Tensor) -> Any:
    """The values of a constant that can be compared; None if they are not known."""
    if isinstance(tensor, FakeTensor):
        constant = tensor.constant
        return None if constant is None else contents(constant)
    if tensor.numel() > _LARGEST_CONSTANT or tensor.is_meta:
        return None
    values = tuple(tensor.detach().flatten().tolist())
    # A number that depends on data, such as a size, has no value while the program is traced.
    known = all(type(value) in (bool, int, float, complex) for value in values)
    return (str(tensor.dtype), values) if known else None


def _plain(func: Any, args: Any, kwargs: Any) -> tuple[tuple[str, Any], ...]:
    names = [argument.name for argument in func._schema.arguments]
    given = [*zip(names, args, strict=False), *kwargs.items()]
    return tuple((name, _without_tensors(value)) for name, value in given)


def _without_tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, (list, tuple)):
        return tuple(_without_tensors(item) for item in value)
    return value if type(value) in (int, float, complex, bool, str, torch.dtype) else str(type(value))


def numbers_of(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments of an op that are values, not sizes or positions.

    An export and a run differ in whether they pass arguments that equal their defaults.
    """
    numbers = []
    for index, (name, kinds, default) in enumerate(_kinds(target)):
        given = args[index] if index < len(args) else kwargs.get(name, default)
        if type(given) in kinds:
            numbers.append(given)
        elif isinstance(given, (list, tuple)):
            numbers += [leaf for leaf in given if type(leaf) in kinds]
    return numbers


@cache
def _kinds(target: torch._ops.OpOverload) -> list[tuple[str, tuple[type, ...], Any]]:
    """The name of every argument of an op, the types of number that are values there, and the default.

    Integers are sizes or positions, which may differ, where the schema says int.
    """
    types = [(a.name, str(a.type), a.default_value) for a in target._schema.arguments]
    values = (int, float, complex)
    return [
        (name, values if "number" in kind or "Tensor" in kind else (float,), default)
        for name, kind, default in types
    ]


def of_one_program(evaluation: Record, training: Record) -> bool:
    """Whether two records are those of one program in its two modes.

    They may differ in the arguments that tell ops such as dropout the mode, and training may count
    batches.
    """
    ours, theirs = live(evaluation, True), live(_without_counters(training), True)
    return len(ours) == len(theirs) and all(map(_same_but_mode, ours, theirs))


def _same_but_mode(one: Step, other: Step) -> bool:
    if (one.target, one.sources, one.shapes) != (other.target, other.sources, other.shapes):
        return False
    return _but_mode(one) == _but_mode(other)


def _but_mode(step: Step) -> list[tuple[str, Any]]:
    if not isinstance(step.target, torch._ops.OpOverload):
        return [("numbers", step.numbers)]
    return [(name, value) for name, value in step.plain if name not in _OF_MODE]


def _without_counters(record: Record) -> Record:
    """Without additions of a number to a registered single number, such as a count of batches."""
    read = {source for step in record.steps for source in step.sources if isinstance(source[0], int)}

    def counts(number: int, step: Step) -> bool:
        if step.target is not torch.ops.aten.add_.Tensor or len(step.sources) != 1:
            return False
        return step.sources[0][0] == "tensor" and step.shapes == ((),) and (number, 0) not in read

    gone = [counts(number, step) for number, step in enumerate(record.steps)]
    before = [0, *accumulate(gone)]

    def moved(source: Origin) -> Origin:
        return (source[0] - before[source[0]], *source[1:]) if isinstance(source[0], int) else source

    steps = [
        step._replace(sources=tuple(map(moved, step.sources)))
        for step, leave in zip(record.steps, gone, strict=True)
        if not leave
    ]
    return Record(steps)
