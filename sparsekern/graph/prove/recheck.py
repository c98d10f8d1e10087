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
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from sparsekern.graph.capture.courses import first_line
from sparsekern.graph.capture.export import Capture
from sparsekern.graph.capture.matching import attached, exported
from sparsekern.graph.capture.program import Captured
from sparsekern.graph.capture.record import Origin, Record, Step, live, of_one_program
from sparsekern.graph.capture.source import Source
from sparsekern.graph.propagate.interpret import Tracked
from sparsekern.graph.propagate.numbering import Numbering
from sparsekern.graph.propagate.records import Records
from sparsekern.graph.propagate.values import Value
from sparsekern.graph.prove.trial import Layout, Outcome, Trials, patterns, search
from sparsekern.graph.rescale import grown


class Fault(NamedTuple):
    """Slots that must stay.

    Attributes:
        ids: raw slot ids, int64.
        reason: why they stay.
    """

    ids: np.ndarray
    reason: str


class _Difference(NamedTuple):
    """A difference between the smaller program and the prediction.

    Attributes:
        step: the step of the whole program.
        reason: what differs.
    """

    step: int
    reason: str


def faults(
    captured: Capture, tensors: Sequence[Tracked], numbering: Numbering, records: Records
) -> list[Fault]:
    """Find the slots that a smaller copy proves to be no channels.

    Args:
        captured: the traced model.
        tensors: its registered tensors with their slots.
        numbering: the numbers of channels and groups.
        records: the records of the settled interpretation.

    Returns:
        One fault for each group that must stay.

    Raises:
        ValueError: a second run of the same copy gives another program.
    """
    found = _Recheck(captured, tensors, numbering, records).found()
    return [
        Fault(np.flatnonzero(numbering.slots_of(numbering.group_of == group)), reason)
        for group, reason in found.items()
    ]


@dataclass(frozen=True)
class Whole:
    """A graph of the whole model, as the ops that a smaller copy is compared with.

    Attributes:
        graph: the graph.
        record: its ops, with the nodes of the graph.
        exported: whether the ops are known from the graph alone, so that a smaller copy is exported.
    """

    graph: Captured
    record: Record
    exported: bool


class _Recheck:
    def __init__(
        self, captured: Capture, tensors: Sequence[Tracked], numbering: Numbering, records: Records
    ) -> None:
        self._source, self._numbering, self._records = captured.source, numbering, records
        self._wholes = [whole_of(captured.source, graph) for graph in captured.graphs]
        self._trials = Trials(captured.source, _layout(tensors, numbering))
        self._epsilons = {epsilon.node: epsilon for epsilon in records.epsilons}

    def found(self) -> dict[int, str]:
        found: dict[int, str] = {}
        left = self._trials.groups
        while left and (more := self._round(left)):
            found |= more
            left = [group for group in left if group not in found]
        # Narrow layers may agree by chance at these widths, so they also run at other widths.
        for pattern in range(1, patterns(self._numbering.group_of) + 1):
            trials = Trials(self._source, self._trials.layout, pattern)
            found |= _failing(trials, [group for group in left if group not in found], pattern % 2 == 1)
        return found

    def _round(self, groups: Sequence[int]) -> dict[int, str]:
        """Some of ``groups`` that cannot be halved, with reasons; empty if all can."""
        for whole in self._wholes:
            try:
                differences = self._tried(whole, groups)
            except Exception:
                return self._failed(groups)
            if differences:
                return self._nearest(whole, differences, groups) or self._searched(groups)
        return {}

    def _failed(self, groups: Sequence[int]) -> dict[int, str]:
        for training in dict.fromkeys(mode for whole in self._wholes for mode in _modes(whole.graph)):
            if found := _failing(self._trials, groups, training):
                return found
        return self._searched(groups)

    def _searched(self, groups: Sequence[int]) -> dict[int, str]:
        for whole in self._wholes:
            if found := dict(search(partial(self._probe, whole), groups)):
                return found
        return {}

    def _probe(self, whole: Whole, groups: Sequence[int]) -> Outcome:
        try:
            differences = self._tried(whole, groups)
        except Exception as error:
            return Outcome(f"a smaller copy cannot be traced: {first_line(error.__cause__ or error)}", -1)
        for step, reason in differences:
            return Outcome(reason, step, list(self._suspects(whole, step)))
        return Outcome(None)

    def _tried(self, whole: Whole, groups: Sequence[int]) -> list[_Difference]:
        """The differences between the whole program and that of a copy with ``groups`` halved.

        Raises:
            Exception: the smaller copy does not run.
        """
        graph = whole.graph
        with self._trials.halved(groups) as numbers:
            if whole.exported:
                small = exported(self._source.again(graph))
            else:
                small = self._source.record(graph.training, numbers, graph.course) or Record()
                other = self._source.record(True, numbers) if graph.both else None
        gone = self._numbering.slots_of(self._trials.gone(groups))
        found = self._differences(whole, small, gone)
        if graph.both and not found and (other is None or not of_one_program(small, other)):
            last = len(live(whole.record)) - 1
            return [_Difference(last, "its training mode runs other ops where it is smaller")]
        return found

    def _nearest(
        self, whole: Whole, differences: Sequence[_Difference], groups: Sequence[int]
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

    def _suspects(self, whole: Whole, step: int) -> Iterator[int]:
        """The groups that the step reads, then those that earlier steps read, each once."""
        seen: set[int] = set()
        for one in reversed(live(whole.record)[: step + 1]):
            for source in reversed(one.node.all_input_nodes if one.node else ()):
                for value in _values(self._records.values.get(source)):
                    for ids in value.ids:
                        if ids is None:
                            continue
                        channels = self._numbering.channel_of[ids]
                        groups = np.unique(self._numbering.group_of[channels[channels >= 0]]).tolist()
                        yield from (group for group in groups if group not in seen)
                        seen.update(groups)

    def _cuts_elsewhere(self, before: Step, now: Step, gone: np.ndarray) -> bool:
        """Whether a slice of channels, or a single one, is elsewhere in the smaller program.

        The end of a slice follows from the size of the result, which is compared, too.
        """
        if before.node is None or _op(before) not in ("slice", "narrow", "select"):
            return False
        value = self._records.values.get(before.node.all_input_nodes[0])
        if not isinstance(value, Value):
            return False
        dim = _argument(before, "dim", 0) % value.ndim
        ids = value.ids[dim]
        if ids is None:
            return False
        size = _predicted(value, gone)[dim]
        start, later = (_start(step, n) for step, n in ((before, len(ids)), (now, size)))
        first = ids[:start]
        return int(((first < 0) | ~gone[first]).sum()) != later

    def _same_numbers(self, before: Step, now: Step, gone: np.ndarray) -> bool:
        """Whether the smaller program uses the same numbers, apart from epsilons that follow a mean."""
        epsilon = self._epsilons.get(before.node) if before.node is not None else None
        expected, found = list(before.numbers), list(now.numbers)
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

    def _differences(self, whole: Whole, small: Record, gone: np.ndarray) -> list[_Difference]:
        """The differences in the order of steps, without those that follow from earlier ones."""
        found: list[_Difference] = []
        odd: set[Origin] = set()
        pairs = zip_longest(live(whole.record), live(small))
        for step, (before, now) in enumerate(pairs):
            if before is None or now is None or not _are_alike(before, now):
                found.append(_Difference(step, "the program runs other ops where it is smaller"))
                break
            if not self._same_numbers(before, now, gone) or _constants(before) != _constants(now):
                reason = f"the program computes a number from its size and uses it in {_label(before)}"
                found.append(_Difference(step, reason))
            values = _values(self._records.values.get(before.node)) if before.node else []
            outputs = {(step, output) for output in range(len(before.shapes))}
            if self._cuts_elsewhere(before, now, gone) and odd.isdisjoint(before.sources):
                found.append(_Difference(step, f"{_label(before)} cuts it by number"))
                odd |= outputs
            if values and [_predicted(value, gone) for value in values] != list(now.shapes):
                if odd.isdisjoint(before.sources) and not (found and found[-1].step == step):
                    found.append(_Difference(step, _written(before)))
                odd |= outputs
        return found


def whole_of(source: Source, graph: Captured) -> Whole:
    """The ops of a graph: those of a run if each has a node, else those of the graph itself."""
    if graph.record is not None:
        return Whole(graph, graph.record, False)
    try:
        record = source.record(graph.training, course=graph.course)
    except Exception:
        record = None
    whole = None if record is None else attached(record, graph)
    return Whole(graph, exported(graph), True) if whole is None else Whole(graph, whole, False)


def _modes(graph: Captured) -> tuple[bool, ...]:
    return (False, True) if graph.both else (graph.training,)


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


def _are_alike(before: Step, now: Step) -> bool:
    """Whether two steps call one op on tensors of the same origin, constants aside."""
    ours, theirs = ([s for s in step.sources if s[0] != "constant"] for step in (before, now))
    return before.target == now.target and ours == theirs and len(before.sources) == len(now.sources)


def _constants(step: Step) -> list[Origin]:
    return [source for source in step.sources if source[0] == "constant"]


def _values(made: Any) -> Sequence[Value]:
    values = made if isinstance(made, (tuple, list)) else (made,)
    return [value for value in values if isinstance(value, Value)]


def _predicted(value: Value, gone: np.ndarray) -> tuple[int, ...]:
    return tuple(
        size if ids is None else int(((ids < 0) | ~gone[ids]).sum())
        for size, ids in zip(value.shape, value.ids, strict=True)
    )


def _argument(step: Step, name: str, default: Any) -> Any:
    """An argument of an op that is no tensor; ``default`` if the call leaves it out."""
    if step.node is not None and not step.plain:
        names = [argument.name for argument in step.target._schema.arguments]
        given = dict(zip(names, step.node.args, strict=False)) | step.node.kwargs
        return given.get(name, default)
    return dict(step.plain).get(name, default)


def _start(step: Step, size: int) -> int:
    """The first index of a slice of a dimension of ``size`` indices, or the one that is selected."""
    start = _argument(step, "index" if _op(step) == "select" else "start", None)
    if start is None or start == str(type(None)):
        return 0
    return slice(start, None).indices(size)[0] if isinstance(start, int) else -1


def _op(step: Step) -> str:
    return getattr(step.target, "__name__", str(step.target)).partition(".")[0]


def _written(step: Step) -> str:
    """Why a result has another size than its slots predict."""
    if _op(step) in ("slice", "narrow", "split", "split_with_sizes", "tensor_split"):
        return f"{_label(step)} cuts it by number"
    return f"its size is written out in {_label(step)}"


def _label(step: Step) -> str:
    if step.node is None or step.node.op == "output":
        return "an output" if step.node or step.target == "output" else _op(step)
    name = _op(step)
    stack = step.node.meta.get("nn_module_stack")
    module = str(list(stack.values())[-1][0]) if stack else ""
    return f"{name} in {module}" if module else name
