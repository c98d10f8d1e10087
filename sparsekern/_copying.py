"""The one way to copy a user's module, whatever results of autograd it keeps."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def copied(
    model: nn.Module, memo: dict[int, Any] | None = None, result: Callable[[Tensor], Tensor] | None = None
) -> nn.Module:
    """``copy.deepcopy(model, memo)``, also where the model keeps results of autograd.

    ``Tensor.__deepcopy__`` refuses those, wherever a forward has put them: an attribute, a list, a
    dataclass. A copy gets their values without their history; the model keeps both.

    ``copy.deepcopy`` shares functions, so that a hook that captured a module of the model still refers to
    the model. In this copy, the hooks and other functions on modules refer to the copy.

    Args:
        model: any module.
        memo: copies that exist already, by ``id``, as ``copy.deepcopy`` takes them.
        result: makes the copy of a result of autograd, from that result without its history; the
            default copies its values.

    Returns:
        The copy. Tensors that are shared in ``model`` are shared in it.
    """
    memo = {} if memo is None else memo
    with _WithoutHistory(result or torch.clone):
        twin: nn.Module = copy.deepcopy(model, memo)
    for module in twin.modules():
        for table in (vars(module), *(vars(module)[name] for name in hook_tables(module))):
            for name, value in list(table.items()):
                if (bound := _rebound(value, memo)) is not value:
                    table[name] = bound
    return twin


def hook_tables(module: nn.Module) -> list[str]:
    """The names of the attributes of a module that hold its hooks and are not empty."""
    return [
        name
        for name, value in vars(module).items()
        if name.endswith("_hooks") and isinstance(value, dict) and value
    ]


def captured(function: FunctionType) -> list[Any]:
    """The objects that a function holds: those of its closure, and the defaults of its arguments."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    return [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _rebound(value: Any, memo: Mapping[int, Any], inside: frozenset[int] = frozenset()) -> Any:
    """``value`` with the copies of what it captured, if it is a function; else ``value`` itself.

    Args:
        value: anything.
        memo: copies by ``id`` of the original.
        inside: the ``id`` of every function that is being rebound; a function may capture itself.
    """
    if id(value) in inside:
        return value
    inside |= {id(value)}

    def again(item: Any) -> Any:
        return memo[id(item)] if id(item) in memo else _rebound(item, memo, inside)

    def changed(items: Iterable[Any]) -> bool:
        return any(again(item) is not item for item in items)

    if isinstance(value, MethodType):
        owner = again(value.__self__)
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        parts = value.func, *value.args, *value.keywords.values()
        if not changed(parts):
            return value
        named = {name: again(item) for name, item in value.keywords.items()}
        return type(value)(again(value.func), *map(again, value.args), **named)
    if isinstance(value, functools._lru_cache_wrapper):
        inner = again(value.__wrapped__)
        # What the cache holds was computed for the original.
        return value if inner is value.__wrapped__ else functools.lru_cache(**value.cache_parameters())(inner)
    if not isinstance(value, FunctionType) or not changed(captured(value)):
        return value
    cells = tuple(CellType(again(c.cell_contents)) if _is_filled(c) else c for c in value.__closure__ or ())
    defaults = None if value.__defaults__ is None else tuple(map(again, value.__defaults__))
    twin = FunctionType(value.__code__, value.__globals__, value.__name__, defaults, cells)
    twin.__kwdefaults__ = value.__kwdefaults__ and {k: again(v) for k, v in value.__kwdefaults__.items()}
    vars(twin).update(vars(value))
    for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
        setattr(twin, name, getattr(value, name))
    return twin


class _WithoutHistory(TorchFunctionMode):
    """Deep copies of results of autograd are made by ``result``."""

    def __init__(self, result: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._result = result

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            with torch.no_grad():
                memo[id(tensor)] = self._result(tensor.detach())
        return memo[id(tensor)]
