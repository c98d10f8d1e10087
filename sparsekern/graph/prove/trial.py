"""Running a smaller copy, to find the groups that a program needs whole.

A size written into a user's ``forward`` shows only when a layer gets smaller. So the copy runs on fake
tensors without about half of every group. If the run fails, the search makes groups whole again until
the program gets further. It begins with the groups that the program touched last.
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

from sparsekern.graph.capture.courses import first_line
from sparsekern.graph.capture.source import Source
from sparsekern.graph.layers import Kept
from sparsekern.graph.prove.shrink import shrunk
from sparsekern.graph.rescale import Rescale


class Outcome(NamedTuple):
    """The outcome of a run.

    Attributes:
        error: the error; None if the run succeeds.
        position: how far the program got, in steps.
        suspects: groups that may be at fault, the likeliest first.
    """

    error: str | None
    position: int = 0
    suspects: Sequence[int] = ()


# Narrower groups may agree by chance with a program that pairs them otherwise.
NARROW = 32

Probe = Callable[[Sequence[int]], Outcome]


@dataclass(frozen=True, eq=False)
class Layout:
    """The channels that run through each tensor.

    Attributes:
        shapes: sizes by tensor number.
        channels: by tensor number, per dimension the channel ids (int64, -1 where an index stays), or
            None for a dimension that no channel runs through.
        group_of: the group of every channel, int64 ``[C]``.
        sizes: by tensor number, attributes that count its indices; see ``Kept``.
        rescales: by tensor number, how its values follow the number of its indices; see ``Kept``.
    """

    shapes: Mapping[int, tuple[int, ...]]
    channels: Mapping[int, tuple[np.ndarray | None, ...]]
    group_of: np.ndarray
    sizes: Mapping[int, Mapping[str, tuple[int, int]]] = field(default_factory=dict)
    rescales: Mapping[int, Rescale | None] = field(default_factory=dict)

    def parts(self, gone: np.ndarray) -> dict[int, Kept]:
        """Find the part of each tensor that stays.

        Args:
            gone: which channels are removed, bool ``[C]``.

        Returns:
            The part of every tensor with channels, by tensor number.
        """
        lost = np.append(gone, False)
        parts = {}
        for number, dims in self.channels.items():
            keep = {d: np.flatnonzero(~lost[ids]) for d, ids in enumerate(dims) if ids is not None}
            keep = {d: k for d, k in keep.items() if len(k) < self.shapes[number][d]}
            parts[number] = Kept(
                self.shapes[number], keep, self.sizes.get(number, {}), self.rescales.get(number)
            )
        return parts

    def groups(self, number: int) -> list[int]:
        """The groups that run through the tensor ``number``, in the order of its dimensions."""
        found: dict[int, None] = {}
        for ids in self.channels.get(number, ()):
            if ids is not None:
                found.update(dict.fromkeys(np.unique(self.group_of[ids[ids >= 0]]).tolist()))
        return list(found)


@dataclass
class Trials:
    """Runs a source's copy with some of its groups halved.

    Attributes:
        source: the source whose copy runs.
        layout: the channels of its tensors.
        pattern: selects how many channels each group loses: 0 is about half, other patterns are more
            mixed for narrow groups.
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
        """The groups that can be halved: those of two channels or more."""
        return list(self._halves)

    def gone(self, groups: Sequence[int]) -> np.ndarray:
        """The channels that are missing when ``groups`` are halved, bool [C]."""
        gone = np.zeros(len(self.layout.group_of), bool)
        for group in groups:
            gone[self._halves[group]] = True
        return gone

    @contextmanager
    def halved(self, groups: Sequence[int]) -> Iterator[dict[int, int]]:
        """Halve ``groups`` while the context lasts; see ``shrunk`` for the value it yields."""
        with shrunk(self.source, self.layout.parts(self.gone(groups))) as numbers:
            yield numbers

    def expect_shapes(self, training: bool) -> None:
        """Run the whole copy and expect the shapes of its outputs from every later run.

        Args:
            training: whether to run in training mode.

        Raises:
            Exception: the whole copy does not run; any error of the program.
        """
        self._shapes[training] = _shapes(self.source.run(training))

    def failing(self, groups: Sequence[int], training: bool) -> dict[int, str]:
        """Find the groups that cannot be halved.

        Args:
            groups: the groups to halve.
            training: whether to run in training mode.

        Returns:
            The error that each of these groups causes, by group.

        Raises:
            ValueError: the program fails even with all groups whole.
        """
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
    """Find the groups that cause errors.

    Args:
        probe: runs the program with the given groups halved.
        groups: the groups to search.

    Yields:
        A group at fault and its error. Without these groups ``probe`` finds no error.

    Raises:
        ValueError: ``probe`` finds an error even without any group.
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
    """Find the group at fault.

    This is the last group of the shortest list of suspects without which the program gets further.

    Args:
        probe: runs the program with the given groups halved.
        groups: the groups to search.
        outcome: the outcome with all of them halved.

    Returns:
        The group, its error and, if known, the outcome with only this group whole.

    Raises:
        ValueError: the program gets no further even with all groups whole.
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
    """Counts the calls of functions and lists the numbers of the tensors used, the latest last."""

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
    """The sizes of every tensor in an output, ``?`` where one depends on data; else the type's name."""
    return [
        [size if type(size) is int else "?" for size in leaf.shape]
        if isinstance(leaf, Tensor)
        else type(leaf).__name__
        for leaf in pytree.tree_leaves(output)
    ]


def patterns(group_of: np.ndarray) -> int:
    """The number of patterns that narrow groups are tried with, besides pattern 0.

    Args:
        group_of: the group of every channel, int64 ``[C]``.

    Returns:
        0 without narrow groups. Else at least 2, one for each mode, and up to 4 to tell all equally narrow
        groups apart.
    """
    sizes = np.bincount(group_of)
    alike = np.bincount(sizes[sizes < NARROW], minlength=2)[2:]
    if not alike.any():
        return 0
    numbers = np.array([_numbers(size) for size in range(2, 2 + len(alike))])
    count = 2
    while count < 4 and ((alike > numbers**count) & (numbers > 1)).any():
        count += 1
    return count


def _numbers(size: int) -> int:
    """How many different numbers of channels a group of ``size`` loses.

    Two of four or more stay: with a single one, programs may take a shorter way, as with one head of queries
    for each of the keys.
    """
    return size - 1 if size < 4 else size - 2


def _halves(group_of: np.ndarray, pattern: int) -> dict[int, np.ndarray]:
    """Choose the channels to remove from every group of two or more, by group.

    Equally wide groups lose different numbers of channels: equal numbers would hide a program that
    pairs the groups. Narrow groups have too few different numbers, so any two of them differ in at
    least one of several patterns.
    """
    starts = np.searchsorted(group_of, np.arange(group_of.max(initial=-1) + 2))
    seen: dict[int, int] = {}
    halves = {}
    for group, (start, end) in enumerate(pairwise(starts.tolist())):
        size = end - start
        if size > 1:
            order = seen[size] = seen.get(size, -1) + 1
            least, numbers = max(size // 4, 1), _numbers(size)
            most = min(size - least, numbers)
            removed = least + (size // 2 - least + order) % (most - least + 1)
            if pattern and size < NARROW:
                removed = 1 + (order // numbers ** (pattern - 1) + 7 * pattern) % numbers
            ids = np.arange(start, end)
            halves[group] = np.concatenate([ids[1::2], ids[2::2]])[:removed]
    return halves
