"""Numbers of channels that the user's own modules keep as attributes, such as ``num_heads``.

A forward that reshapes to ``self.num_heads`` runs with fewer heads only where that attribute
follows. Which attribute it is, is seen by running the traced copy with marked numbers in the
place of its attributes: the mark is still there when the number arrives in a reshape. Where
another number arrives, one module of each class is tried out with fewer heads.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .capture import Capture, Source, undisturbed
from .interpret import Tracked
from .numbering import Numbering
from .records import Records, Shaped
from .slots import Slots
from .trial import Fault, Trials

_RESHAPES = frozenset({"view", "reshape", "unflatten"})


class _Derived(int):
    """A number computed from an attribute: it follows by itself."""

    def _from(self, value: Any) -> Any:
        return _Derived(value) if type(value) is int else value

    def __add__(self, other: Any) -> Any:
        return self._from(int(self) + other)

    def __mul__(self, other: Any) -> Any:
        return self._from(int(self) * other)

    def __floordiv__(self, other: Any) -> Any:
        return self._from(int(self) // other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._from(other // int(self))

    __radd__, __rmul__ = __add__, __mul__


class _Mark(_Derived):
    """A number that knows which attribute of which module it is."""

    module: str
    name: str


class _Reshape(NamedTuple):
    """before, after: shapes. sizes: as the program gave them, by dimension of the result."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    sizes: dict[int, int]


def follow(
    captured: Capture,
    tensors: Sequence[Tracked],
    slots: Slots,
    numbering: Numbering,
    records: Records,
    split: Collection[str],
) -> list[Fault]:
    """Note on the tensors which attributes count their channels, as ``Tracked.sizes``.

    split: modules that split channels into heads or the like. Returns the channels of those that
    cannot do with fewer of them.
    """
    source = captured.source
    shaped = [
        found
        for found in records.shaped
        if _channels(found, numbering) and (found.module in split or _counted(source.clone, found, numbering))
    ]
    if not shaped:
        return []
    followed: dict[int, set[int]] = {}
    for reshape in _reshapes(source):
        for number, found in enumerate(shaped):
            if (found.before, found.after) != (reshape.before, reshape.after):
                continue
            for dim, size in reshape.sizes.items():
                ids = found.ids[dim]
                if isinstance(size, _Mark) and ids is not None and _around(found.module, size.module):
                    _note(ids, size, tensors, slots, numbering)
                if size == -1 or isinstance(size, _Derived):
                    followed.setdefault(number, set()).add(dim)
    doubtful = [
        (found.module, ids)
        for number, found in enumerate(shaped)
        for dim, ids in enumerate(found.ids)
        if ids is not None and found.module in split and dim not in followed.get(number, ())
    ]
    return list(_stuck(captured, tensors, numbering, doubtful))


def _stuck(
    captured: Capture,
    tensors: Sequence[Tracked],
    numbering: Numbering,
    doubtful: Sequence[tuple[str, np.ndarray]],
) -> Iterator[Fault]:
    """Channels of those classes of modules of which the first one fails with fewer."""
    modules: dict[str, set[int]] = {}
    for module, ids in doubtful:
        channels = numbering.channel_of[ids[ids >= 0]]
        groups = numbering.group_of[channels[channels >= 0]]
        modules.setdefault(module, set()).update(groups.tolist())
    classes: dict[type, list[set[int]]] = {}
    for module, of_module in modules.items():
        if of_module:
            classes.setdefault(type(captured.source.clone.get_submodule(module)), []).append(of_module)
    if not classes:
        return
    trials = Trials(captured.source, tensors, numbering)
    for alike in classes.values():
        error = trials.error(alike[0])
        if error is not None:
            groups = sorted(set().union(*alike))
            slots = numbering.slots_of(np.isin(numbering.group_of, groups))
            yield Fault(np.flatnonzero(slots), error)


def _channels(shaped: Shaped, numbering: Numbering) -> bool:
    return any(ids is not None and (numbering.channel_of[ids] >= 0).any() for ids in shaped.ids)


def _around(module: str, outer: str) -> bool:
    return not outer or f"{module}.".startswith(f"{outer}.")


def _counted(model: nn.Module, shaped: Shaped, numbering: Numbering) -> bool:
    """Whether a module around the reshape has an attribute as large as a dimension of channels."""
    sizes = {len(ids) for ids in shaped.ids if ids is not None and (numbering.channel_of[ids] >= 0).any()}
    path = shaped.module.split(".") if shaped.module else []
    around = [".".join(path[:n]) for n in range(len(path) + 1)]
    return any(value in sizes for name in around for _, value in _numbers(model.get_submodule(name)))


def _numbers(module: nn.Module) -> list[tuple[str, int]]:
    """Attributes that may count channels; torch's own layers are brought in line by kind."""
    if type(module).__module__.startswith("torch.nn."):
        return []
    return [(name, value) for name, value in vars(module).items() if type(value) is int and value > 1]


def _note(
    ids: np.ndarray, mark: _Mark, tensors: Sequence[Tracked], slots: Slots, numbering: Numbering
) -> None:
    """Attribute ``mark`` counts ``ids``: find how many indices of their tensor one of them is."""
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
    """The reshapes, with the sizes that they are given."""

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
        placed = {first + place: size for place, size in enumerate(sizes)}
        self.found.append(_Reshape(tuple(x.shape), tuple(result.shape), placed))


def _reshapes(source: Source) -> list[_Reshape]:
    recorder = _Recorder()
    with undisturbed(), _marked(source.clone), source.mode, torch.no_grad(), recorder:
        for training in (False, True):
            random.seed(0)
            source.run(training)
    return recorder.found


@contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """The model's own numbers carry marks while the context lasts."""
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
