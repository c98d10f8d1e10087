"""Running a smaller copy, to find the groups that a program does not let go.

A size written into somebody's ``forward`` shows only when a layer gets smaller. So the copy is run
on fake tensors with about half of every group gone. Where that fails, groups are made whole
again, those that the program touched last first, until it gets on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from sparsekern.graph.capture.export import Source, first_line
from sparsekern.graph.layers import Kept
from sparsekern.graph.prove.shrink import shrunk


class Outcome(NamedTuple):
    """error: what went wrong. position: how far the program got. suspects: groups, likely first."""

    error: str | None
    position: int = 0
    suspects: Sequence[int] = ()


Probe = Callable[[Sequence[int]], Outcome]


@dataclass(frozen=True, eq=False)
class Layout:
    """Which channels run through which tensors.

    shapes: by tensor number. channels: per dimension their ids, -1 where an index stays, None
    where no channel runs through it. group_of: of every channel. sizes: see ``Kept``.
    """

    shapes: Mapping[int, tuple[int, ...]]
    channels: Mapping[int, tuple[np.ndarray | None, ...]]
    group_of: np.ndarray
    sizes: Mapping[int, Mapping[str, tuple[int, int]]] = field(default_factory=dict)

    def parts(self, gone: np.ndarray) -> dict[int, Kept]:
        """What stays of each tensor without the channels ``gone``, bool [C]."""
        lost = np.append(gone, False)
        parts = {}
        for number, dims in self.channels.items():
            keep = {d: np.flatnonzero(~lost[ids]) for d, ids in enumerate(dims) if ids is not None}
            keep = {d: k for d, k in keep.items() if len(k) < self.shapes[number][d]}
            parts[number] = Kept(self.shapes[number], keep, self.sizes.get(number, {}))
        return parts

    def groups(self, number: int) -> list[int]:
        """The groups that run through a tensor, those of its first dimension first."""
        found: dict[int, None] = {}
        for ids in self.channels.get(number, ()):
            if ids is not None:
                found.update(dict.fromkeys(np.unique(self.group_of[ids[ids >= 0]]).tolist()))
        return list(found)


@dataclass
class Trials:
    """Runs a source's copy with some of the groups halved. groups: those that can be.

    pattern: how many channels each of them loses; 0 is about half, others are more mixed.
    """

    source: Source
    layout: Layout
    pattern: int = 0
    _halves: dict[int, np.ndarray] = field(init=False)
    _shapes: dict[bool, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._halves = _halves(self.layout.group_of, self.pattern)

    @property
    def groups(self) -> list[int]:
        return list(self._halves)

    def gone(self, groups: Sequence[int]) -> np.ndarray:
        """The channels that are missing when ``groups`` are halved, bool [C]."""
        gone = np.zeros(len(self.layout.group_of), bool)
        for group in groups:
            gone[self._halves[group]] = True
        return gone

    @contextmanager
    def halved(self, groups: Sequence[int]) -> Iterator[dict[int, int]]:
        """See ``shrunk``."""
        with shrunk(self.source, self.layout.parts(self.gone(groups))) as numbers:
            yield numbers

    def expect_shapes(self, training: bool) -> None:
        """Run the whole copy: from now on outputs of other shapes are a fault, too."""
        self._shapes[training] = _shapes(self.source.run(training))

    def failing(self, groups: Sequence[int], training: bool) -> dict[int, str]:
        """Those of ``groups`` that cannot be halved, with the error each of them causes."""
        return dict(search(lambda some: self._run(some, training), groups))

    def _run(self, groups: Sequence[int], training: bool) -> Outcome:
        recorder = _Recorder({})
        try:
            with self.halved(groups) as recorder.numbers, recorder:
                shapes = _shapes(self.source.run(training))
        except Exception as error:
            return self._outcome(f"the program depends on its size: {first_line(error)}", recorder)
        whole = self._shapes.get(training, shapes)
        if shapes == whole:
            return Outcome(None)
        changed = next((f"{b} for {a}" for a, b in zip(whole, shapes, strict=False) if a != b), "")
        return self._outcome(f"the outputs change their shape with it: {changed}", recorder)

    def _outcome(self, error: str, recorder: _Recorder) -> Outcome:
        suspects: dict[int, None] = {}
        for number in reversed(recorder.used):
            suspects.update(dict.fromkeys(self.layout.groups(number)))
        return Outcome(error, recorder.calls, list(suspects))


def search(probe: Probe, groups: Sequence[int]) -> Iterator[tuple[int, str]]:
    """The groups without which ``probe`` finds no error, one by one, each with its error.

    Raises ValueError where it finds one even without any.
    """
    left = list(groups)
    known: Outcome | None = None
    while left:
        outcome = known or probe(left)
        if outcome.error is None:
            return
        group, error, known = _culprit(probe, left, outcome)
        left.remove(group)
        yield group, error


def _culprit(probe: Probe, groups: Sequence[int], outcome: Outcome) -> tuple[int, str, Outcome | None]:
    """The group that ends the shortest list of suspects without which the program gets on.

    With its error and, where known, the outcome without it alone.
    """
    order = [group for group in outcome.suspects if group in groups]
    order += [group for group in groups if group not in order]
    outcomes = {0: outcome}

    def gets_on(count: int) -> bool:
        now = outcomes[count] = probe(order[count:])
        return now.error is None or now.position > outcome.position

    bad, good = 0, 1
    while not gets_on(good):
        if good == len(order):
            raise ValueError(
                f"model: a second run of its forward differs from the first: {outcomes[good].error}; "
                "expected a program that repeats"
            )
        bad, good = good, min(2 * good, len(order))
    while good - bad > 1:
        middle = (good + bad) // 2
        if gets_on(middle):
            good = middle
        else:
            bad = middle
    return order[bad], outcomes[bad].error or "", outcomes[1] if good == 1 else None


class _Recorder(TorchFunctionMode):
    """Counts the functions called and lists the tensors used, by number, the latest last."""

    def __init__(self, numbers: dict[int, int]) -> None:
        super().__init__()
        self.numbers = numbers
        self.used: dict[int, None] = {}
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.calls += 1
        for argument in (*args, *(kwargs or {}).values()):
            for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
                number = self.numbers.get(id(tensor))
                if number is not None:
                    self.used.pop(number, None)
                    self.used[number] = None
        return func(*args, **(kwargs or {}))


def _shapes(output: Any) -> list[Any]:
    """Of every tensor in an output its sizes, ``?`` where they depend on data; else the type."""
    return [
        [size if type(size) is int else "?" for size in leaf.shape]
        if isinstance(leaf, Tensor)
        else type(leaf).__name__
        for leaf in pytree.tree_leaves(output)
    ]


def _halves(group_of: np.ndarray, pattern: int) -> dict[int, np.ndarray]:
    """Some of the channels of every group of two or more.

    Equally wide groups lose different numbers, or a program that pairs them would not show it. So
    many numbers there are not in narrow groups; over several patterns any two of them differ once.
    """
    starts = np.searchsorted(group_of, np.arange(group_of.max(initial=-1) + 2))
    seen: dict[int, int] = {}
    halves = {}
    for group, (start, end) in enumerate(pairwise(starts.tolist())):
        size = end - start
        if size > 1:
            order = seen[size] = seen.get(size, -1) + 1
            least = max(size // 4, 1)
            removed = least + (size // 2 - least + order) % (size - 2 * least + 1)
            if pattern:
                removed = 1 + (order // (size - 1) ** (pattern - 1) + 7 * pattern) % (size - 1)
            ids = np.arange(start, end)
            halves[group] = np.concatenate([ids[1::2], ids[2::2]])[:removed]
    return halves
