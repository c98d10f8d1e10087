"""Running a smaller copy, to find sizes and numbers of channels that a program depends on.

What a trace shows as a constant may be computed from a number of channels (``/ x.shape[1] ** 0.5``),
and an ``if`` over one leaves no trace at all. So the copy is run on fake tensors with about half
of every group gone: it has to call the same functions with the same numbers, and to give outputs
of the same shapes.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .capture import Source, first_line, undisturbed
from .interpret import Tracked
from .numbering import Numbering
from .shrink import shrunk

# Functions whose integers are values; elsewhere they are sizes and positions, which may differ.
_NAMES = """
add sub mul div truediv floordiv pow mod rsub multiply divide true_divide floor_divide subtract
remainder clamp clamp_min clamp_max clip fill full_like masked_fill where lerp addcmul addcdiv
tensor as_tensor scalar_tensor maximum minimum
"""
_ARITHMETIC = frozenset(
    f"{prefix}{name}{suffix}"
    for name in _NAMES.split()
    for prefix, suffix in (("", ""), ("", "_"), ("__", "__"), ("__r", "__"), ("__i", "__"))
)


class Fault(NamedTuple):
    """Raw ids of slots that have to stay, and why."""

    ids: np.ndarray
    reason: str


class _Recorder(TorchFunctionMode):
    """The names of all functions called, with the numbers that they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[float]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        self.calls.append((name, _numbers(name, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


def _numbers(name: str, arguments: Any) -> list[float]:
    """The numbers among the arguments that say what is computed, not how large it is."""
    kinds: tuple[type, ...] = (int, float) if name in _ARITHMETIC else (float,)
    numbers: list[float] = []
    for leaf in pytree.tree_leaves(arguments):
        if isinstance(leaf, (int, float)) and type(leaf) in kinds:
            numbers.append(leaf)
    return numbers


class _Run(NamedTuple):
    calls: list[tuple[str, list[float]]]
    shapes: list[Any]


class Trials:
    """Runs the source's copy with some of the groups halved."""

    def __init__(self, source: Source, tensors: Sequence[Tracked], numbering: Numbering) -> None:
        self._source, self._tensors, self._numbering = source, tensors, numbering
        self._halves = _halves(numbering)
        self._whole = {training: self._run(training) for training in (False, True)}

    def faults(self) -> Iterator[Fault]:
        """The groups that cannot be halved; one mode after the other, without those found."""
        left = list(self._halves)
        for training in (False, True):
            while left and (error := self._error(left, training)) is not None:
                found = dict(self._search(left, training)) or self._last_straw(left, training)
                for group, reason in found.items():
                    inside = self._numbering.slots_of(self._numbering.group_of == group)
                    yield Fault(np.flatnonzero(inside), reason)
                left = [group for group in left if group not in found]
                if not found:
                    raise RuntimeError(f"model: its forward pass is not repeatable: {error}")

    def error(self, groups: Iterable[int]) -> str | None:
        """What goes wrong in either mode when ``groups`` are halved, those of one channel aside."""
        left = [group for group in groups if group in self._halves]
        errors = (self._error(left, training) for training in (False, True) if left)
        return next((error for error in errors if error is not None), None)

    def _search(self, groups: Sequence[int], training: bool) -> Iterator[tuple[int, str]]:
        """Those of ``groups``, together at fault, that fail alone."""
        middle = len(groups) // 2
        for part in (groups[:middle], groups[middle:]):
            if part and (error := self._error(part, training)) is not None:
                if len(part) == 1:
                    yield part[0], error
                else:
                    yield from self._search(part, training)

    def _last_straw(self, groups: Sequence[int], training: bool) -> dict[int, str]:
        """Of groups that fail only together, the one that completes the first failing set."""
        good, bad = 0, len(groups)
        while bad - good > 1:
            middle = (good + bad) // 2
            if self._error(groups[:middle], training) is None:
                good = middle
            else:
                bad = middle
        error = self._error(groups[:bad], training)
        return {} if error is None else {groups[bad - 1]: error}

    def _error(self, groups: Sequence[int], training: bool) -> str | None:
        """What goes wrong when ``groups`` are halved."""
        gone = np.zeros(len(self._numbering.group_of), bool)
        for group in groups:
            gone[self._halves[group]] = True
        with shrunk(self._source, self._tensors, self._numbering.slots_of(gone)):
            try:
                run = self._run(training)
            except Exception as error:
                return f"the program depends on its size: {first_line(error)}"
        whole = self._whole[training]
        if [name for name, _ in run.calls] != [name for name, _ in whole.calls]:
            return "the program calls other functions where it is smaller"
        for (name, now), (_, before) in zip(run.calls, whole.calls, strict=True):
            if now != before:
                return f"the program computes a number from its size and uses it in {name}"
        return None if run.shapes == whole.shapes else "the outputs change their shape with it"

    def _run(self, training: bool) -> _Run:
        recorder = _Recorder()
        with undisturbed():
            random.seed(0)
            np.random.seed(0)
            torch.default_generator.manual_seed(0)
            with self._source.mode, torch.no_grad(), recorder:
                output = self._source.run(training)
        shapes = [
            tuple(map(str, t.shape)) if isinstance(t, Tensor) else type(t) for t in pytree.tree_leaves(output)
        ]
        return _Run(recorder.calls, shapes)


def _halves(numbering: Numbering) -> dict[int, np.ndarray]:
    """About half of the channels of every group of two or more.

    Equally wide groups lose different numbers, or a program that pairs them would not show it.
    """
    starts = np.searchsorted(numbering.group_of, np.arange(numbering.group_of.max(initial=-1) + 2))
    seen: dict[int, int] = {}
    halves = {}
    for group, (start, end) in enumerate(pairwise(starts)):
        size = int(end - start)
        order = seen[size] = seen.get(size, -1) + 1
        removed = size // 2 - order % max(size // 4, 1)
        if removed > 0:
            halves[group] = np.arange(start, end)[1::2][:removed]
    return halves
