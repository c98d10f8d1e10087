"""What earlier runs of a model left behind, and what a trace would leave behind, in caches.

A forward may compute a tensor from its weights once and keep it: a table of relative positions, the
angles of rotary embeddings. In the copy of a model that has been run, such a tensor would be a constant
that follows no weight. So the copy forgets the tensors that its forward makes again.
"""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple

from torch import Tensor, nn

from sparsekern._copying import captured
from sparsekern.graph.capture.kept import Keeping, held_by


class _Place(NamedTuple):
    """A key of a mapping, or an attribute, that holds a tensor.

    Attributes:
        thing: the holder.
        key: the key or the attribute's name.
        tensor: the tensor.
    """

    thing: Any
    key: Any
    tensor: Tensor

    def forget(self, leave_none: bool) -> None:
        if isinstance(self.thing, MutableMapping):
            del self.thing[self.key]
        elif leave_none:
            object.__setattr__(self.thing, self.key, None)
        else:
            object.__delattr__(self.thing, self.key)

    def refilled(self) -> bool:
        """Whether the place holds a new tensor like the forgotten one."""
        new, old = held_by(self.thing).get(self.key), self.tensor
        return isinstance(new, Tensor) and (new.shape, new.dtype) == (old.shape, old.dtype)


def forget_results(model: nn.Module, run: Callable[[bool], Any]) -> None:
    """Remove the tensors that the model's forward would make again.

    Args:
        model: the traced copy, changed in place.
        run: runs the copy in training mode or not, and restores nothing.
    """
    keeping = Keeping(model)
    for places in _by_kind(keeping, model):
        for leave_none in (True, False):
            if _are_made_again(places, leave_none, keeping, run):
                for place in places:
                    place.forget(leave_none)
                keeping = Keeping(model)
                break


def _by_kind(keeping: Keeping, model: nn.Module) -> list[list[_Place]]:
    """The tensors on modules that are no parameters or buffers, together where a class keeps them alike."""
    registered = {id(t) for t in (*model.parameters(), *model.buffers())}
    found: dict[Any, list[_Place]] = {}
    for holder in keeping.holders:
        thing = holder.thing
        if holder.of_class or isinstance(thing, (list, tuple, set, deque)) or _is_torchs(thing):
            continue
        name = "" if isinstance(thing, nn.Module) else holder.where.rpartition(".")[2]
        for key, tensor in holder.held.items():
            if isinstance(tensor, Tensor) and id(tensor) not in registered:
                kind = type(thing), name, key
                found.setdefault(kind, []).append(_Place(thing, key, tensor))
    return list(found.values())


def _is_torchs(thing: Any) -> bool:
    return isinstance(thing, nn.Module) and type(thing).__module__.startswith("torch.")


def _are_made_again(
    places: list[_Place], leave_none: bool, keeping: Keeping, run: Callable[[bool], Any]
) -> bool:
    made: set[int] = set()
    for training in (False, True):
        try:
            for place in places:
                place.forget(leave_none)
            run(training)
            made |= {number for number, place in enumerate(places) if place.refilled()}
        except Exception:
            if not training:
                return False
        finally:
            keeping.restore()
        if len(made) == len(places):
            return True
    return False


class Memoised:
    """The functions of a model that remember results by ``functools.lru_cache``, or ``cache``.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        kinds = {kind for module in model.modules() for kind in type(module).__mro__}
        kinds = {kind for kind in kinds if kind.__module__.partition(".")[0] not in ("torch", "builtins")}
        tables = [vars(kind) for kind in kinds] + [vars(module) for module in model.modules()]
        tables += [vars(sys.modules[n]) for n in {k.__module__ for k in kinds} if n in sys.modules]
        self._caches = {id(c): c for table in tables for v in list(table.values()) for c in _caches(v)}

        self._used: dict[int, Any] = {}

    @property
    def any_filled(self) -> bool:
        """Whether a function remembers results of earlier runs."""
        return any(cache.cache_info().currsize for cache in self._caches.values())

    @contextmanager
    def forgotten(self) -> Iterator[None]:
        """Forget what the functions that the forward calls remember, at the start and at the end.

        Otherwise a trace reads results that it should follow, and leaves tensors without data to later
        runs of the user's model. Only functions that an earlier run called are known at the start.
        """
        for cache in self._used.values():
            cache.cache_clear()
        before = {key: cache.cache_info() for key, cache in self._caches.items()}
        try:
            yield
        finally:
            for key, cache in self._caches.items():
                if cache.cache_info() != before[key]:
                    self._used[key] = cache
                    cache.cache_clear()


def _caches(value: Any, depth: int = 2) -> Iterator[Any]:
    """The caches of a function: itself, or one that it wraps."""
    if isinstance(value, (staticmethod, classmethod, property)):
        value = value.fget if isinstance(value, property) else value.__func__
    if isinstance(value, functools._lru_cache_wrapper):
        yield value
    elif isinstance(value, FunctionType) and depth:
        for inner in captured(value):
            yield from _caches(inner, depth - 1)
