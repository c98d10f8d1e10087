"""Hooks around ``load_state_dict`` of a live model; copies and pickles of the model drop them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle


class Listener(Protocol):
    """Receives a call before and after a module loads a state dict."""

    def before_load(self, module: nn.Module, metadata: dict[str, Any]) -> None:
        """Called before ``module`` loads; ``metadata`` is that of ``Module._load_from_state_dict``."""

    def after_load(self, module: nn.Module) -> None:
        """Called after ``module`` and its submodules have loaded."""


class _Hook:
    """A hook with a weak reference to its listener. Copying or pickling the hook drops the listener."""

    def __init__(self, listener: Listener | None = None) -> None:
        self._listener = (lambda: None) if listener is None else weakref.ref(listener)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return type(self)()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return type(self), ()


class _Before(_Hook):
    def __call__(
        self, module: nn.Module, _: dict[str, Any], __: str, metadata: dict[str, Any], *___: Any
    ) -> None:
        if (listener := self._listener()) is not None:
            listener.before_load(module, metadata)


class _After(_Hook):
    def __call__(self, module: nn.Module, _: Any) -> None:
        if (listener := self._listener()) is not None:
            listener.after_load(module)


def listen(modules: Iterable[nn.Module], listener: Listener) -> list[RemovableHandle]:
    """Call ``listener`` at every load of one of ``modules``, also when a parent module loads.

    Returns:
        Handles whose ``remove()`` ends the calls. The calls also end when the listener is garbage-collected.
    """
    handles = []
    for module in modules:
        handles.append(module.register_load_state_dict_pre_hook(_Before(listener)))
        handles.append(module.register_load_state_dict_post_hook(_After(listener)))
    return handles


def forget_listeners(module: nn.Module) -> None:
    """Remove the hooks of :func:`listen` from a copy."""
    for part in module.modules():
        for hooks in (part._load_state_dict_pre_hooks, part._load_state_dict_post_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "hook", hook), _Hook)]:
                del hooks[key]
