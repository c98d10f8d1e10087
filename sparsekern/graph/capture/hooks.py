"""Hooks of the user's modules, which a trace leaves out because its tensors have no data.

A hook may also change the inputs or outputs of its module. If this cannot be ruled out, a placeholder
op takes the hook's place, and channels that pass through the op stay.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_library = torch.library.Library("sparsekern_graph", "FRAGMENT")
_library.define("hooked(Tensor x) -> Tensor")
_library.impl("hooked", torch.clone, "CompositeExplicitAutograd")
_library._register_fake("hooked", torch.empty_like)

_GLOBAL = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)


def detach_hooks(model: nn.Module) -> None:
    """Remove all hooks except those of ``torch.nn.utils``, which make weights.

    A placeholder op, through which nothing is pruned, replaces every forward hook that may change
    inputs or outputs.

    Args:
        model: The traced copy, changed in place.
    """
    for module in model.modules():
        standing = [
            (hooks, key, stand_in)
            for hooks, stand_in in ((module._forward_pre_hooks, _before), (module._forward_hooks, _after))
            for key, hook in hooks.items()
            if not _makes_weights(hook) and may_change(hook)
        ]
        _drop(module)
        for hooks, key, stand_in in standing:
            hooks[key] = stand_in


def drop_hooks(model: nn.Module) -> None:
    """Remove all hooks except those of ``torch.nn.utils``, which make weights.

    Args:
        model: A model, changed in place.
    """
    for module in model.modules():
        _drop(module)


def _drop(module: nn.Module) -> None:
    module._backward_hooks.clear()
    module._backward_pre_hooks.clear()
    for hooks, named in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key, hook in list(hooks.items()):
            if not _makes_weights(hook):
                del hooks[key]
                named.pop(key, None)


def may_change(hook: Callable[..., Any]) -> bool:
    """Whether a hook may return a value other than None.

    Args:
        hook: A forward hook or forward pre-hook.

    Returns:
        False only if its annotation or its bytecode rules out such a value.
    """
    while isinstance(hook, functools.partial):
        hook = hook.func
    function: Any = hook if inspect.isroutine(hook) else type(hook).__call__
    if getattr(function, "__annotations__", {}).get("return", Any) in (None, "None"):
        return False
    code = getattr(function, "__code__", None)
    if code is None or inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        return True
    before: dis.Instruction | None = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "RETURN_CONST":
            if instruction.argval is not None:
                return True
        elif instruction.opname == "RETURN_VALUE":
            none = before is not None and before.opname == "LOAD_CONST" and before.argval is None
            if not none or instruction.is_jump_target:
                return True
        before = instruction
    return False


@contextmanager
def without_global_hooks() -> Iterator[None]:
    """Disable the hooks registered for all modules while the context lasts."""
    tables = [getattr(nn.modules.module, name, {}) for name in _GLOBAL]
    held = [dict(table) for table in tables]
    try:
        for table in tables:
            table.clear()
        yield
    finally:
        for table, hooks in zip(tables, held, strict=True):
            table.update(hooks)


def _makes_weights(hook: object) -> bool:
    return any(kind.__module__.startswith("torch.nn.utils.") for kind in type(hook).__mro__)


def _before(module: nn.Module, args: Any) -> Any:
    return _marked(args)


def _after(module: nn.Module, args: Any, output: Any) -> Any:
    return _marked(output)


def _marked(values: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.ops.sparsekern_graph.hooked, values)
