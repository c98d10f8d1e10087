"""Programs that take several courses, depending on values: all of them have to have the same channels.

``if not x.isfinite().all(): x = x.clamp(...)`` leads to two programs with the same channels. A layer that is
skipped by chance may lead to others. A run may take each decision in another way than the courses that were
traced, so it is not enough that some channels fit all of them: each course alone has to tie the slots that
it reads as all of them together do. And the smaller network has to decide as the masked one does. It does
where the condition asks whether values are finite, which zeros are, or where it is left to chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from sparsekern.graph.capture.courses import Site
from sparsekern.graph.capture.export import Capture
from sparsekern.graph.capture.program import Captured
from sparsekern.graph.capture.record import Origin, Record, Step
from sparsekern.graph.capture.source import Undecided
from sparsekern.graph.propagate.split_interpretations import Round

_ASKING = frozenset({"_local_scalar_dense", "item", "is_nonzero", "equal"})
_OF_FINITENESS = frozenset({"isfinite", "isnan", "isinf", "isposinf", "isneginf"})
_OF_CHANCE = frozenset({"rand", "randn", "randint", "randperm", "bernoulli"})
_COMBINING = frozenset(
    {
        *("all", "any", "logical_and", "logical_or", "logical_not"),
        *("bitwise_and", "bitwise_or", "bitwise_not", "lt", "le", "gt", "ge", "eq", "ne"),
        *("add", "sub", "mul", "div", "to", "_to_copy", "clone", "detach", "alias"),
        *("lift_fresh", "lift_fresh_copy", "select", "slice", "unbind", "view", "reshape"),
    }
)


def check_courses(captured: Capture, attempt: Callable[[Capture], Round]) -> None:
    """Check that the courses of each mode have the same channels.

    Args:
        captured: the traced model.
        attempt: runs the interpreter over graphs, on newly allocated slots.

    Raises:
        Undecided: a course ties other slots than the courses together.
    """
    for training in (False, True):
        graphs = [graph for graph in captured.graphs if graph.training == training]
        if len(graphs) < 2:
            continue
        site = next(_sites(graphs), None)
        records = [captured.source.record(training, course=graph.course) for graph in graphs]
        if not all(record is not None and _asks_alike(record) for record in records):
            raise Undecided(captured.source.undecided(training, site))
        together = attempt(replace(captured, graphs=tuple(graphs)))
        for graph in graphs:
            alone = attempt(replace(captured, graphs=(graph,)))
            if not _agree(alone, together):
                raise Undecided(captured.source.undecided(training, site))


def _agree(alone: Round, together: Round) -> bool:
    ids = [i for n in sorted(alone.records.read) for i in alone.tensors[n].ids if i is not None]
    slots = np.concatenate([np.empty(0, np.int64), *ids])
    ours, theirs = (_classes(made, slots) for made in (alone, together))
    return np.array_equal(ours, theirs)


def _classes(made: Round, slots: np.ndarray) -> np.ndarray:
    """For each slot, the position of the first slot of its class."""
    roots = made.slots.classes()[0][slots]
    _, first, inverse = np.unique(roots, return_index=True, return_inverse=True)
    return first[inverse]


def _asks_alike(record: Record) -> bool:
    """Whether every condition on values is the same for a masked network and the smaller one."""
    asked = [step for step in record.steps if _name(step) in _ASKING]
    left = [source for step in asked for source in step.sources]
    seen: set[Origin] = set()
    while left:
        source = left.pop()
        if source in seen:
            continue
        seen.add(source)
        if not isinstance(source[0], int):
            if source[0] != "constant":
                return False
            continue
        step = record.steps[source[0]]
        name = _name(step)
        if name in _OF_FINITENESS or name in _OF_CHANCE:
            continue
        if name not in _COMBINING:
            return False
        left += step.sources
    return True


def _name(step: Step) -> str:
    return str(getattr(getattr(step.target, "_schema", None), "name", "")).removeprefix("aten::")


def _sites(graphs: list[Captured]) -> Iterator[Site]:
    """The lines whose answers differ between courses."""
    usual = graphs[0].course
    for graph in graphs[1:]:
        yield from (site for site, answers in graph.course.items() if answers != usual.get(site, (False,)))
