"""Checking a trace against the trace of a smaller copy.

One trace does not show every dependence on size. ``view(n, 4, c // 4, h, w)`` and
``view(n, c // 4, 4, h, w)`` leave the same trace if c is 16. A constant may be computed from a number
of channels (``/ x.shape[1] ** 0.5``), and an ``if`` on such a number leaves no trace. So the copy is
traced again without about half of every group. It must run the same ops with the same numbers, and
every tensor must have the size that its slots predict.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sparsekern.graph.capture.courses import steps
from sparsekern.graph.capture.export import Capture, first_line
from sparsekern.graph.capture.program import Captured
from sparsekern.graph.propagate.interpret import Tracked, shapes
from sparsekern.graph.propagate.numbering import Numbering
from sparsekern.graph.propagate.records import Records
from sparsekern.graph.propagate.values import Value
from sparsekern.graph.prove.trial import Layout, Outcome, Trials, search
from sparsekern.graph.rescale import grown

_PATTERNS = (1, 2, 3)
_NARROW = 32


class Fault(NamedTuple):
    """Slots that must stay.

    Attributes:
        ids: Raw slot ids, int64.
        reason: Why they stay.
    """

    ids: np.ndarray
    reason: str


class _Difference(NamedTuple):
    """A difference between the smaller program and the prediction.

    Attributes:
        step: The step of the whole program.
        reason: What differs.
    """

    step: int
    reason: str


def faults(
    captured: Capture, tensors: Sequence[Tracked], numbering: Numbering, records: Records
) -> list[Fault]:
    """Find the slots that a smaller copy proves to be no channels.

    Args:
        captured: The traced model.
        tensors: Its registered tensors with their slots.
        numbering: The numbers of channels and groups.
        records: The records of the settled interpretation.

    Returns:
        One fault for each group that must stay.

    Raises:
        ValueError: A second trace of the same copy gives another program.
    """
    found = _Recheck(captured, tensors, numbering, records).found()
    return [
        Fault(np.flatnonzero(numbering.slots_of(numbering.group_of == group)), reason)
        for group, reason in found.items()
    ]


class _Recheck:
    def __init__(
        self, captured: Capture, tensors: Sequence[Tracked], numbering: Numbering, records: Records
    ) -> None:
        self._captured, self._numbering, self._records = captured, numbering, records
        self._steps = {graph.training: list(steps(graph.module)) for graph in captured.graphs}
        self._trials = Trials(captured.source, _layout(tensors, numbering))
        self._epsilons = {epsilon.node: epsilon for epsilon in records.epsilons}

    def found(self) -> dict[int, str]:
        found: dict[int, str] = {}
        left = self._trials.groups
        while left and (more := self._round(left)):
            found |= more
            left = [group for group in left if group not in found]
        # Narrow layers may agree by chance at these widths, so they also run at other widths.
        sizes = np.bincount(self._numbering.group_of)
        for pattern in _PATTERNS if (sizes < _NARROW).any() else ():
            trials = Trials(self._captured.source, self._trials.layout, pattern)
            found |= _failing(trials, [group for group in left if group not in found], pattern % 2 == 1)
        return found

    def _round(self, groups: Sequence[int]) -> dict[int, str]:
        """Some of ``groups`` that cannot be halved, with reasons; empty if all can."""
        try:
            with self._trials.halved(groups):
                smaller = [self._captured.source.export(graph.training) for graph in self._captured.graphs]
        except ValueError:
            for graph in self._captured.graphs:
                if found := _failing(self._trials, groups, graph.training):
                    return found
            return self._searched(groups)
        gone = self._numbering.slots_of(self._trials.gone(groups))
        for whole, small in zip(self._captured.graphs, smaller, strict=True):
            if differences := self._differences(whole, small, gone):
                return self._nearest(whole, differences, groups) or self._searched(groups)
        return {}

    def _searched(self, groups: Sequence[int]) -> dict[int, str]:
        for graph in self._captured.graphs:
            if found := dict(search(partial(self._probe, graph), groups)):
                return found
        return {}

    def _probe(self, whole: Captured, groups: Sequence[int]) -> Outcome:
        try:
            with self._trials.halved(groups):
                small = self._captured.source.export(whole.training)
        except ValueError as error:
            return Outcome(f"a smaller copy cannot be traced: {first_line(error.__cause__ or error)}", -1)
        gone = self._numbering.slots_of(self._trials.gone(groups))
        for step, reason in self._differences(whole, small, gone):
            return Outcome(reason, step, list(self._suspects(whole, step)))
        return Outcome(None)

    def _nearest(
        self, whole: Captured, differences: Sequence[_Difference], groups: Sequence[int]
    ) -> dict[int, str]:
        """The nearest group that each difference's step reads, with the difference as the reason.

        Empty if the differences remain when these groups stay whole.
        """
        found: dict[int, str] = {}
        for step, reason in differences:
            group = next((g for g in self._suspects(whole, step) if g in groups), None)
            if group is not None:
                found.setdefault(group, reason)
        outcome = self._probe(whole, [group for group in groups if group not in found])
        explained = outcome.error is None or outcome.position > differences[-1].step
        return found if explained else {}

    def _suspects(self, whole: Captured, step: int) -> Iterator[int]:
        """The groups that the step reads, then those that earlier steps read, each once."""
        seen: set[int] = set()
        for node in reversed(self._steps[whole.training][: step + 1]):
            for source in reversed(node.all_input_nodes):
                for value in _values(self._records.values.get(source)):
                    for ids in value.ids:
                        if ids is None:
                            continue
                        channels = self._numbering.channel_of[ids]
                        groups = np.unique(self._numbering.group_of[channels[channels >= 0]]).tolist()
                        yield from (group for group in groups if group not in seen)
                        seen.update(groups)

    def _cuts_elsewhere(self, before: fx.Node, now: fx.Node, gone: np.ndarray) -> bool:
        """Whether a slice of channels starts elsewhere in the smaller program than its channels do.

        Its end follows from the size of the result, which is compared, too.
        """
        if _op(before) not in ("slice", "narrow"):
            return False
        value = self._records.values.get(before.all_input_nodes[0])
        if not isinstance(value, Value):
            return False
        given: Any = before.args[1] if len(before.args) > 1 else 0
        dim = given % value.ndim
        ids = value.ids[dim]
        if ids is None:
            return False
        size = _predicted(value, gone)[dim]
        start, later = (_start(node, n) for node, n in ((before, len(ids)), (now, size)))
        first = ids[:start]
        return int(((first < 0) | ~gone[first]).sum()) != later

    def _same_numbers(self, before: fx.Node, now: fx.Node, gone: np.ndarray) -> bool:
        """Whether the smaller program uses the same numbers, apart from epsilons that follow a mean."""
        epsilon = self._epsilons.get(before)
        expected, found = _numbers(before), _numbers(now)
        if epsilon is None:
            return expected == found
        ids = epsilon.average.ids
        left = len(ids) - int(gone[ids[ids >= 0]].sum())
        number = grown(epsilon.number, len(ids), max(left, 1), epsilon.average.exponent)
        if epsilon.default:
            expected = [*expected, epsilon.number] if left < len(ids) else expected
        place = next((i for i, n in enumerate(expected) if abs(n) == abs(epsilon.number)), None)
        if len(expected) != len(found) or place is None:
            return expected == found
        expected[place] = math.copysign(number, expected[place])
        return all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(expected, found, strict=True))

    def _differences(self, whole: Captured, small: Captured, gone: np.ndarray) -> list[_Difference]:
        """The differences in the order of steps, without those that follow from earlier ones."""
        found: list[_Difference] = []
        odd: set[fx.Node] = set()
        constants = _changed_constants(whole, small)
        pairs = zip_longest(self._steps[whole.training], steps(small.module))
        for step, (before, now) in enumerate(pairs):
            if before is None or now is None or _skeleton(before) != _skeleton(now):
                found.append(_Difference(step, "the program runs other ops where it is smaller"))
                break
            sources = before.all_input_nodes
            if not self._same_numbers(before, now, gone) or any(node.name in constants for node in sources):
                reason = f"the program computes a number from its size and uses it in {_label(before)}"
                found.append(_Difference(step, reason))
            values = _values(self._records.values.get(before))
            if self._cuts_elsewhere(before, now, gone) and odd.isdisjoint(sources):
                found.append(_Difference(step, f"{_label(before)} cuts it by number"))
                odd.add(before)
            if values and [_predicted(value, gone) for value in values] != [s for s, _ in shapes(now)]:
                if odd.isdisjoint(sources) and not (found and found[-1].step == step):
                    found.append(_Difference(step, _written(before)))
                odd.add(before)
        return found


def _failing(trials: Trials, groups: Sequence[int], training: bool) -> dict[int, str]:
    """The groups that fail in a run; empty if the whole copy does not run outside a trace either."""
    try:
        return trials.failing(groups, training)
    except ValueError:
        return {}


def _layout(tensors: Sequence[Tracked], numbering: Numbering) -> Layout:
    channels = {}
    for number, tensor in enumerate(tensors):
        own = [None if ids is None else numbering.channel_of[ids] for ids in tensor.ids]
        if any(ids is not None and (ids >= 0).any() for ids in own):
            channels[number] = tuple(own)
    shapes_of = {number: tensors[number].entry.shape for number in channels}
    sizes = {n: {path: (dim, per) for path, dim, per in tensors[n].sizes} for n in channels}
    rescales = {n: tensors[n].rescale for n in channels}
    return Layout(shapes_of, channels, numbering.group_of, sizes, rescales)


def _skeleton(node: fx.Node) -> tuple[Any, ...]:
    return node.target, [source.name for source in node.all_input_nodes]


def _numbers(node: fx.Node) -> list[Any]:
    """The arguments of a node that are values, not sizes or positions."""
    if not isinstance(node.target, torch._ops.OpOverload):
        plain: tuple[type, ...] = (int, float) if node.op == "output" else (float,)
        return [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if type(leaf) in plain]
    numbers = []
    for index, (name, kinds) in enumerate(_kinds(node.target)):
        given = node.args[index] if index < len(node.args) else node.kwargs.get(name)
        if type(given) in kinds:
            numbers.append(given)
        elif isinstance(given, (list, tuple)):
            numbers += [leaf for leaf in given if type(leaf) in kinds]
    return numbers


@cache
def _kinds(target: torch._ops.OpOverload) -> list[tuple[str, tuple[type, ...]]]:
    """The name of every argument of an op, and the types of number that are values there.

    Integers are sizes or positions, which may differ, where the schema says int.
    """
    types = [(argument.name, str(argument.type)) for argument in target._schema.arguments]
    values = (int, float, complex)
    return [(name, values if "number" in kind or "Tensor" in kind else (float,)) for name, kind in types]


def _changed_constants(whole: Captured, small: Captured) -> set[str]:
    return {
        name
        for name, tensor in whole.constants.items()
        if isinstance(tensor, Tensor) and not _same(tensor, small.constants.get(name))
    }


def _same(tensor: Tensor, other: Any) -> bool:
    if not isinstance(other, Tensor) or tensor.shape != other.shape:
        return False
    # Constants computed on fake tensors have no data. Ops of the graph made them and are compared.
    fake = any(isinstance(t, torch._subclasses.FakeTensor) for t in (tensor, other))
    return fake or torch.equal(tensor, other)


def _values(made: Any) -> Sequence[Value]:
    values = made if isinstance(made, (tuple, list)) else (made,)
    return [value for value in values if isinstance(value, Value)]


def _predicted(value: Value, gone: np.ndarray) -> tuple[int, ...]:
    return tuple(
        size if ids is None else int(((ids < 0) | ~gone[ids]).sum())
        for size, ids in zip(value.shape, value.ids, strict=True)
    )


def _start(node: fx.Node, size: int) -> int:
    """The first index of a slice of a dimension of ``size`` indices."""
    start = node.args[2] if len(node.args) > 2 else node.kwargs.get("start")
    return slice(start, None).indices(size)[0] if start is None or isinstance(start, int) else -1


def _op(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).partition(".")[0]


def _written(node: fx.Node) -> str:
    """Why a result has another size than its slots predict."""
    if _op(node) in ("slice", "narrow", "split", "split_with_sizes", "tensor_split"):
        return f"{_label(node)} cuts it by number"
    return f"its size is written out in {_label(node)}"


def _label(node: fx.Node) -> str:
    if node.op == "output":
        return "an output"
    name = _op(node)
    stack = node.meta.get("nn_module_stack")
    module = str(list(stack.values())[-1][0]) if stack else ""
    return f"{name} in {module}" if module else name
