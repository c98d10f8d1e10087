"""Hooks of the user's modules in the traced copy.

A hook that touches only its arguments, the model and constants is a part of the model's program, and so is
a hook of the library that the model comes from: such hooks run in the copy. Other hooks watch from outside,
such as a logger's. They are left out, because the tensors of a trace have no data. A watching hook may also
change the inputs or outputs of its module. If this cannot be ruled out, a placeholder op takes the hook's
place, and channels that pass through the op stay.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsekern._copying import captured
from sparsekern.graph.capture.kept import Keeping, is_installed

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
# Functions of these modules compute; those of others (logging, wandb, os) may act on the outside.
_COMPUTING = frozenset(
    {"torch", "numpy", "math", "cmath", "operator", "functools", "itertools", "collections", "typing", "copy"}
)
_ACTING = frozenset({"open", "exec", "eval", "input", "__import__", "breakpoint", "globals"})
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, type)
_OUTER_NAMES = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})
_OUTER_WRITES = frozenset({"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_NAME", "IMPORT_NAME"})


def keep_own_hooks(model: nn.Module) -> bool:
    """Remove the hooks that watch from outside, and those of backward passes.

    A placeholder op, through which nothing is pruned, replaces every such forward hook that may change
    inputs or outputs.

    Args:
        model: the traced copy, changed in place.

    Returns:
        Whether hooks are left that belong to the model, besides those of ``torch.nn.utils``.
    """
    own = _Own(model)
    return any([_keep(module, own.belongs, stand_in=True) for module in model.modules()])


def detach_hooks(model: nn.Module) -> None:
    """Remove all hooks as ``keep_own_hooks`` does, also those that belong to the model.

    Args:
        model: the traced copy, changed in place.
    """
    for module in model.modules():
        _keep(module, lambda hook: False, stand_in=True)


def drop_hooks(model: nn.Module) -> None:
    """Remove the hooks that watch from outside, and those of backward passes.

    Args:
        model: a model, changed in place.
    """
    own = _Own(model)
    for module in model.modules():
        _keep(module, own.belongs, stand_in=False)


def _keep(module: nn.Module, belongs: Callable[[Any], bool], stand_in: bool) -> bool:
    """Keep the hooks of a module that make weights or belong to the model; whether any does the latter."""
    module._backward_hooks.clear()
    module._backward_pre_hooks.clear()
    found = False
    for hooks, named, marking in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, _before),
        (module._forward_hooks, module._forward_hooks_with_kwargs, _after),
    ):
        for key, hook in list(hooks.items()):
            if _makes_weights(hook) or hook is marking:
                continue
            if belongs(hook):
                found = True
                continue
            named.pop(key, None)
            if stand_in and may_change(hook):
                hooks[key] = marking
            else:
                del hooks[key]
    return found


class _Own:
    """Tells which hooks belong to a model.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        keeping = Keeping(model)
        self._parts = {id(holder.thing) for holder in keeping.holders}
        self._parts |= {id(t) for t in (*model.parameters(), *model.buffers())}
        packages = {type(module).__module__.partition(".")[0] for module in model.modules()}
        self._packages = packages - {"torch", "sparsekern"}

    def belongs(self, hook: Any) -> bool:
        """Whether a hook is a part of the model's program."""
        while isinstance(hook, functools.partial):
            if not all(self._is_inside(item, frozenset()) for item in (*hook.args, *hook.keywords.values())):
                return False
            hook = hook.func
        if isinstance(hook, MethodType):
            return self._is_inside(hook.__self__, frozenset()) and self._computes(hook.__func__, frozenset())
        if isinstance(hook, FunctionType):
            return self._computes(hook, frozenset())
        # The copy has a hook object of its own, so that what it keeps on itself is apart from the user's.
        return callable(hook) and self._computes(type(hook).__call__, frozenset())

    def _computes(self, function: Any, inside: frozenset[int]) -> bool:
        """Whether a function touches only its arguments, the model and constants."""
        if not isinstance(function, FunctionType) or id(function) in inside:
            return id(function) in inside
        name = function.__module__ or ""
        if name.partition(".")[0] in self._packages and is_installed(name):
            return True
        inside |= {id(function)}
        outer = [
            function.__globals__[n] for n in _outer_names(function.__code__) if n in function.__globals__
        ]
        acting = _ACTING.intersection(_outer_names(function.__code__))
        if acting or _writes_outside(function.__code__):
            return False
        return all(self._is_inside(item, inside) for item in (*captured(function), *outer))

    def _is_inside(self, item: Any, inside: frozenset[int]) -> bool:
        if id(item) in self._parts or isinstance(item, _PLAIN):
            return True
        if isinstance(item, (tuple, frozenset)):
            return all(self._is_inside(one, inside) for one in item)
        if isinstance(item, ModuleType):
            return item.__name__.partition(".")[0] in _COMPUTING | {"builtins"}
        if isinstance(item, MethodType):
            return self._is_inside(item.__self__, inside) and self._computes(item.__func__, inside)
        if isinstance(item, BuiltinFunctionType) and item.__self__ is not None:
            return self._is_inside(item.__self__, inside)
        module = str(getattr(item, "__module__", None) or "builtins").partition(".")[0]
        if callable(item) and module in _COMPUTING | {"builtins"} and not isinstance(item, nn.Module):
            return True
        return self._computes(item, inside)


def _outer_names(code: CodeType) -> set[str]:
    """The global names that a function's code reads, with those of the functions inside."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname in _OUTER_NAMES}
    return found.union(*(_outer_names(c) for c in code.co_consts if isinstance(c, CodeType)))


def _writes_outside(code: CodeType, free: frozenset[str] | None = None) -> bool:
    """Whether a function's code assigns to a variable outside of it, or imports."""
    free = frozenset(code.co_freevars) if free is None else free.intersection(code.co_freevars)
    for instruction in dis.get_instructions(code):
        if instruction.opname in _OUTER_WRITES:
            return True
        if instruction.opname == "STORE_DEREF" and instruction.argval in free:
            return True
    return any(_writes_outside(c, free) for c in code.co_consts if isinstance(c, CodeType))


def may_change(hook: Callable[..., Any]) -> bool:
    """Whether a hook may return a value other than None.

    Args:
        hook: a forward hook or forward pre-hook.

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
