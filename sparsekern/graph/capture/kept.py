"""Tensors that a forward leaves on its modules, such as features for a loss, a hidden state or a cache.

The search covers attributes, lists, dicts, sets, dataclasses and other objects of the user's classes.
These may be nested, and may be shared between modules or by a class.
"""

from __future__ import annotations

import sys
import sysconfig
from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn

# Attributes that every module has for torch. Parameters and buffers are traced separately.
_OF_TORCH = frozenset(vars(nn.Module()))
_CONTAINERS = (Mapping, list, tuple, set, deque, SimpleNamespace)


class Kept(NamedTuple):
    """A tensor that a forward left on a module.

    Attributes:
        where: its place, such as ``encoder.features['deep'][0]``.
        tensor: the tensor.
    """

    where: str
    tensor: Tensor


class Holder(NamedTuple):
    """An object that holds others.

    Attributes:
        where: its place in the model.
        thing: the object.
        held: the objects that it held at first, by key.
        of_class: whether a class holds it, so that copies of the model share it.
    """

    where: str
    thing: Any
    held: dict[Any, Any]
    of_class: bool = False


class Keeping:
    """A snapshot of the objects that a model's modules hold, for comparison and restoration.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._packages = {_package(type(module)) for module in model.modules()} - {"torch"}
        self._holders = list(self._all(model))
        tensors = [v for holder in self._holders for v in holder.held.values() if isinstance(v, Tensor)]
        # Holding the tensors themselves prevents the reuse of their ids.
        self._known = {id(tensor): tensor for tensor in (*tensors, *model.parameters(), *model.buffers())}

    @property
    def holders(self) -> Sequence[Holder]:
        """The modules and all objects that may hold tensors for them, each once."""
        return self._holders

    def new(self) -> list[Kept]:
        """The tensors put on the modules since the snapshot, each once."""
        found: dict[int, Kept] = {}
        for where, thing, held, _ in self._holders:
            for key, value in held_by(thing).items():
                if value is not held.get(key):
                    for kept in self._tensors(_inside(where, thing, key), value, set()):
                        found.setdefault(id(kept.tensor), kept)
        return list(found.values())

    def restore(self) -> None:
        """Restore the objects that are or may hold tensors. Counters keep their new values."""
        for _, thing, held, _ in self._holders:
            now = held_by(thing)
            changed = [key for key in {**now, **held} if self._replaced(held.get(key), now.get(key))]
            if changed:
                _put_back(thing, held, changed)

    def _replaced(self, old: Any, new: Any) -> bool:
        return old is not new and (self._may_hold(old) or self._may_hold(new))

    def _all(self, model: nn.Module) -> Iterator[Holder]:
        """The modules and all objects that may hold tensors for them, each once."""
        left: deque[tuple[str, Any, bool]] = deque((*named, False) for named in model.named_modules())
        left += ((*named, True) for named in self._of_classes(model))
        seen: set[int] = set()
        while left:
            where, thing, of_class = left.popleft()
            if id(thing) in seen or isinstance(thing, Tensor):
                continue
            seen.add(id(thing))
            held = held_by(thing)
            yield Holder(where, thing, held, of_class)
            left += [(_inside(where, thing, k), v, of_class) for k, v in held.items() if self._may_hold(v)]

    def _of_classes(self, model: nn.Module) -> Iterator[tuple[str, Any]]:
        for kind in {kind: None for module in model.modules() for kind in type(module).__mro__}:
            if self._is_users(kind):
                for name, value in vars(kind).items():
                    if not name.startswith("__") and isinstance(value, _CONTAINERS):
                        yield f"{kind.__name__}.{name}", value

    def _tensors(self, where: str, value: Any, seen: set[int]) -> Iterator[Kept]:
        if isinstance(value, Tensor):
            if id(value) not in self._known:
                yield Kept(where, value)
        elif self._may_hold(value) and id(value) not in seen:
            seen.add(id(value))
            for key, item in held_by(value).items():
                yield from self._tensors(_inside(where, value, key), item, seen)

    def _may_hold(self, thing: Any) -> bool:
        """Whether ``thing`` is a tensor or may hold one. False for modules, which are holders already."""
        if isinstance(thing, (Tensor, *_CONTAINERS)):
            return True
        return not isinstance(thing, (nn.Module, type)) and self._is_users(type(thing))

    def _is_users(self, kind: type) -> bool:
        """Whether to search objects of the class. A library's logger or trainer would lead everywhere."""
        return _package(kind) in self._packages or not is_installed(kind.__module__)


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


@cache
def is_installed(module: str) -> bool:
    """Whether a Python module, given by name, belongs to an installed package or to Python itself."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return module != "__main__"
    return file.startswith(tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")))


def held_by(thing: Any) -> dict[Any, Any]:
    """The objects that a module, container or other object holds, by key, position or attribute."""
    if isinstance(thing, nn.Module):
        return {name: value for name, value in vars(thing).items() if name not in _OF_TORCH}
    if isinstance(thing, Mapping):
        return dict(thing)
    if isinstance(thing, (list, tuple, deque)):
        return dict(enumerate(thing))
    if isinstance(thing, set):
        return {id(item): item for item in thing}
    found = {}
    for kind in type(thing).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name != "__dict__" and hasattr(thing, name):
                found[name] = getattr(thing, name)
    return found | getattr(thing, "__dict__", {})


def _put_back(thing: Any, held: Mapping[Any, Any], changed: list[Any]) -> None:
    if isinstance(thing, set):
        thing.clear()
        thing.update(held.values())
    elif isinstance(thing, (list, deque)):
        thing.clear()
        thing.extend(held.values())
    elif isinstance(thing, MutableMapping):
        # The whole mapping is refilled, so that the keys keep their order.
        thing.clear()
        thing.update(held)
    elif not isinstance(thing, (tuple, Mapping)):
        for name in changed:
            # ``object``'s methods bypass the class, which may be a frozen dataclass.
            if name in held:
                object.__setattr__(thing, name, held[name])
            else:
                object.__delattr__(thing, name)


def _inside(where: str, thing: Any, key: Any) -> str:
    if isinstance(thing, (Mapping, list, tuple, deque)):
        return f"{where}[{key!r}]"
    if isinstance(thing, set):
        return where
    return f"{where}.{key}" if where else str(key)
