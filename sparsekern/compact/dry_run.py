"""Trying out a graph before it is relied on: compact copies without memory, run on the example."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from sparsekern._sharding import unwrap
from sparsekern.compact.plan import TensorPlan, make_plan
from sparsekern.compact.surgery import Registered, build, like, match, registered
from sparsekern.compact.verify import as_arguments, leaves

if TYPE_CHECKING:
    from sparsekern.graph import ChannelGraph, Group

# What a forward pass gives, as far as a dry run can see: shapes by position in the output.
_Shapes = list[tuple[str, Any]]


def dry_run(
    model: nn.Module,
    graph: ChannelGraph,
    example_inputs: Any,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> ChannelGraph:
    """``graph`` without the groups whose channels ``model``'s own code does not let go.

    A size written into somebody's ``forward`` shows only when a layer gets smaller. So a copy
    with about half of every group gone is run in evaluation and training mode, on fake tensors:
    no memory, no change to the model or to random state. Where that fails, or gives outputs of
    other shapes, the groups at fault are searched for and frozen, with the error as the reason.
    Returns ``graph`` itself where nothing fails. The model's forward hooks are left out, except
    those of ``torch.nn.utils``.

    Raises ``ValueError`` if the model does not accept the example inputs at its full size.
    """
    trial = _Trial(unwrap(model), graph, as_arguments(example_inputs, example_kwargs))
    groups = [group for group in graph.groups if len(group.channels) > 1]
    with _undisturbed():
        faults = dict(_faults(trial, groups))
    # Freezing renumbers the groups behind: from the last to the first, the numbers stay right.
    for number in sorted(faults, reverse=True):
        graph = graph.freeze([number], faults[number])
    return graph


class _Trial:
    """Runs fake copies of a model with some of its groups halved."""

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
    ) -> None:
        self._model = model
        self._graph = graph
        self._tensors = registered(model)
        # A shape environment lets forward passes through that read numbers off tensors.
        self._fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        self._args, self._kwargs = pytree.tree_map_only(
            Tensor, lambda t: self._fake.from_tensor(t, static_shapes=True), arguments
        )
        self._halves = _halves(graph.groups)
        self._whole: dict[bool, _Shapes] = {}
        self._latest: tuple[frozenset[int], nn.Module] | None = None

    def modes(self) -> list[bool]:
        """The modes, as values of ``training``, in which the model runs at its full size."""
        self._whole[False] = self._run((), training=False)
        # Batch norm refuses to train on a single value per channel: then there is nothing to try.
        with _errors():
            self._whole[True] = self._run((), training=True)
        return list(self._whole)

    def error(self, groups: Sequence[Group], training: bool) -> str | None:
        """What goes wrong when ``groups`` are halved, as a sentence, or None."""
        shapes: _Shapes = []
        with _errors() as failed:
            shapes = self._run(groups, training)
        if failed:
            return failed[0]
        before = self._whole[training]
        if shapes != before:
            changed = next((a for a, b in zip(shapes, before, strict=False) if a != b), "output")
            return f"the shape of the model's output changes: {changed}"
        return None

    def _run(self, groups: Sequence[Group], training: bool) -> _Shapes:
        small = self.copy(groups)
        small.train(training)
        with self._fake, torch.no_grad():
            output = small(*self._args, **self._kwargs)
        return [(where, _shape(leaf)) for where, leaf in leaves(output)]

    def copy(self, groups: Sequence[Group]) -> nn.Module:
        """A fake copy of the model with ``groups`` halved; the latest one serves both modes."""
        key = frozenset(group.id for group in groups)
        if self._latest is None or self._latest[0] != key:
            kept = np.ones(self._graph.num_channels, dtype=bool)
            for number in key:
                kept[self._halves[number]] = False
            parts = match(make_plan(self._graph, kept), self._tensors)
            small = build(self._model, self._tensors, parts, lambda entry: self._empty(entry, parts))
            drop_hooks(small)
            self._latest = key, small
        return self._latest[1]

    def _empty(self, entry: Registered, parts: Mapping[int, TensorPlan]) -> Tensor:
        with self._fake:
            return like(entry.tensor, parts[id(entry.tensor)], torch.empty_strided)


def _shape(leaf: Any) -> Any:
    """The sizes of a tensor, with ``?`` for those that depend on its values; else the type."""
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    return tuple(size if type(size) is int else "?" for size in leaf.shape)


def _faults(trial: _Trial, groups: Sequence[Group]) -> Iterator[tuple[int, str]]:
    """The groups that cannot be halved, each with the error it causes."""
    trial.copy(())  # a model that cannot be copied says so itself
    try:
        modes = trial.modes()
    except Exception as error:
        raise ValueError(f"example_inputs: the model does not accept them: {_sentence(error)}") from error
    left = list(groups)
    for training in modes:
        while left and (reason := trial.error(left, training)) is not None:
            found = dict(_search(trial, left, training)) or _last_straw(trial, left, training)
            if not found:
                raise RuntimeError(f"model: its forward pass is not repeatable: {reason}")
            yield from found.items()
            left = [group for group in left if group.id not in found]


def _search(trial: _Trial, groups: Sequence[Group], training: bool) -> Iterator[tuple[int, str]]:
    """Those of ``groups``, together at fault, that fail alone: by halving, as most are innocent."""
    middle = len(groups) // 2
    for part in (groups[:middle], groups[middle:]):
        if part and (error := trial.error(part, training)) is not None:
            if len(part) == 1:
                yield part[0].id, error
            else:
                yield from _search(trial, part, training)


def _last_straw(trial: _Trial, groups: Sequence[Group], training: bool) -> dict[int, str]:
    """Of groups that fail only together, the one that completes the first failing set."""
    good, bad = 0, len(groups)
    while bad - good > 1:
        middle = (good + bad) // 2
        if trial.error(groups[:middle], training) is None:
            good = middle
        else:
            bad = middle
    error = trial.error(groups[:bad], training)
    return {} if error is None else {groups[bad - 1].id: error}


def _halves(groups: Sequence[Group]) -> dict[int, np.ndarray[Any, Any]]:
    """About half of the channels of each group, never all of them.

    Equally wide groups lose unequal numbers: a wrong tie between them would not show otherwise.
    """
    seen: dict[int, int] = {}
    halves = {}
    for group in groups:
        size = len(group.channels)
        order = seen[size] = seen.get(size, -1) + 1
        removed = size // 2 - order % max(size // 4, 1)
        halves[group.id] = np.asarray(group.channels)[1::2][:removed]
    return halves


def drop_hooks(model: nn.Module) -> None:
    """Hooks of the user would see fake tensors, in the user's own lists and loggers."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if not type(hook).__module__.startswith("torch.nn.utils."):
                    del hooks[key]


def _sentence(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


@contextmanager
def _errors() -> Iterator[list[str]]:
    """Collects what the block raises: any error of the user's code is a finding here."""
    failed: list[str] = []
    try:
        yield failed
    except Exception as error:
        failed.append(_sentence(error))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Random state stays, compiled parts run eagerly, and warnings about fake runs are not shown."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.compiler.set_stance("force_eager"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
