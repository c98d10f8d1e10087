"""Numbers of channels that the user's own modules keep as attributes, such as ``num_heads``.

A forward that reshapes to ``self.num_heads`` runs with fewer heads only if the attribute changes, too.
To find the attribute, the traced copy runs with marked numbers in place of its attributes: a number
that arrives in a reshape still has its mark.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from sparsekern.graph.capture.export import Capture
from sparsekern.graph.capture.source import Source
from sparsekern.graph.layers import own_numbers
from sparsekern.graph.propagate.interpret import Tracked
from sparsekern.graph.propagate.numbering import Numbering
from sparsekern.graph.propagate.records import Records, Shaped
from sparsekern.graph.propagate.slots import Slots

_RESHAPES = frozenset({"view", "reshape", "unflatten"})


class _Mark(int):
    """A number marked with the attribute that it comes from.

    Attributes:
        module: Path of the module.
        name: Name of the attribute.
    """

    module: str
    name: str


class _Reshape(NamedTuple):
    """A reshape to sizes of which some are attributes.

    Attributes:
        before: Shape of the operand.
        after: Shape of the result.
        marks: The sizes that are attributes, by dimension of the result.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    marks: dict[int, _Mark]


def follow(
    captured: Capture, tensors: Sequence[Tracked], slots: Slots, numbering: Numbering, records: Records
) -> None:
    """Find the attributes that count channels and record them in ``Tracked.sizes``.

    Args:
        captured: The traced model.
        tensors: Its registered tensors, changed in place.
        slots: All slots.
        numbering: The numbers of channels and groups.
        records: The records of the settled interpretation, with the reshapes.
    """
    source = captured.source
    shaped = [found for found in records.shaped if _counted(source.clone, found, numbering)]
    if not shaped:
        return
    for reshape in _reshapes(source, [graph.training for graph in captured.graphs]):
        for found in shaped:
            if (found.before, found.after) != (reshape.before, reshape.after):
                continue
            for dim, mark in reshape.marks.items():
                ids = found.ids[dim]
                if ids is not None and _around(found.module, mark.module):
                    _note(ids, mark, tensors, slots, numbering)


def _around(module: str, outer: str) -> bool:
    return not outer or f"{module}.".startswith(f"{outer}.")


def _counted(model: nn.Module, shaped: Shaped, numbering: Numbering) -> bool:
    """Whether a module around the reshape has an attribute equal to the size of a dimension of channels."""
    sizes = {len(ids) for ids in shaped.ids if ids is not None and (numbering.channel_of[ids] >= 0).any()}
    path = shaped.module.split(".") if shaped.module else []
    around = [".".join(path[:n]) for n in range(len(path) + 1)]
    return any(value in sizes for name in around for _, value in _numbers(model.get_submodule(name)))


def _numbers(module: nn.Module) -> list[tuple[str, int]]:
    """Attributes that may count channels."""
    return [(name, value) for name, value in own_numbers(module).items() if value > 1]


def _note(
    ids: np.ndarray, mark: _Mark, tensors: Sequence[Tracked], slots: Slots, numbering: Numbering
) -> None:
    """Record that the attribute ``mark`` counts ``ids``.

    Nothing is recorded unless each counted index is the same number of indices of one tensor.
    """
    if (ids < 0).any():
        return
    owners = slots.owners(ids)
    if len(owners) != 1:
        return
    number, dim = owners[0]
    tensor = tensors[number]
    whole = tensor.ids[dim]
    path = f"{mark.module}.{mark.name}" if mark.module else mark.name
    if whole is None or len(whole) % len(ids) or any(path == known for known, _, _ in tensor.sizes):
        return
    per = len(whole) // len(ids)
    counted, all_of_them = (np.unique(numbering.channel_of[i], return_counts=True) for i in (ids, whole))
    if np.array_equal(counted[0], all_of_them[0]) and np.array_equal(counted[1] * per, all_of_them[1]):
        tensor.sizes = (*tensor.sizes, (path, dim, per))


class _Recorder(TorchFunctionMode):
    """Records the reshapes to sizes that are attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[_Reshape] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _RESHAPES and isinstance(result, Tensor):
            self._record(func.__name__, args, kwargs or {}, result)
        return result

    def _record(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> None:
        x, *rest = *args, *kwargs.values()
        sizes = pytree.tree_leaves(rest, is_leaf=lambda item: isinstance(item, torch.Size))
        sizes = [s for item in sizes for s in (item if isinstance(item, torch.Size) else [item])]
        first = int(sizes.pop(0)) % x.ndim if name == "unflatten" else 0
        marks = {first + place: size for place, size in enumerate(sizes) if isinstance(size, _Mark)}
        if marks:
            self.found.append(_Reshape(tuple(x.shape), tuple(result.shape), marks))


def _reshapes(source: Source, modes: Iterable[bool]) -> list[_Reshape]:
    recorder = _Recorder()
    with _marked(source.clone), recorder:
        for training in modes:
            # A forward may refuse marked numbers. The attributes that it has not shown by then stay, and a
            # smaller copy shows which channels need them.
            with suppress(Exception):
                source.run(training)
    return recorder.found


@contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """Mark the attributes of the model that may count channels while the context lasts."""
    restore: list[tuple[nn.Module, str, int]] = []
    for path, module in model.named_modules():
        for name, value in _numbers(module):
            mark = _Mark(value)
            mark.module, mark.name = path, name
            module.__dict__[name] = mark
            restore.append((module, name, value))
    try:
        yield
    finally:
        for module, name, value in restore:
            module.__dict__[name] = value
