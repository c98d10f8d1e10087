"""Finding the optimizer that updates the parameters inside the wrappers that trainers put around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils import _pytree as pytree

_EXPECTED = "expected a torch.optim.Optimizer, or a wrapper whose step() steps one that it holds"

State = MutableMapping[Any, dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Unwrapped:
    """Result of :func:`unwrap_optimizer`.

    Attributes:
        optimizer: the optimizer whose steps update the parameters and run step hooks.
        holders: the optimizer, its parts and the wrappers; each may keep state per parameter.
        parts: optimizers among which ``optimizer`` divides its parameters, as ZeroRedundancyOptimizer does.
    """

    optimizer: Optimizer
    holders: tuple[object, ...]
    parts: tuple[Optimizer, ...]

    @property
    def states(self) -> tuple[State, ...]:
        """``optimizer.state``, then further state per parameter that wrappers keep (slow weights).

        The property is evaluated on each access, because ``load_state_dict`` replaces the dict
        ``optimizer.state``.
        """
        return _distinct_states(self.holders)


def unwrap_optimizer(given: object) -> Unwrapped:
    """Find the optimizer in ``given``, through any number of wrappers.

    Wrappers of accelerate, Lightning, Fabric, Lookahead, SAM and others hold an optimizer in an attribute.
    Rows are processed in the step of that inner optimizer. A wrapper may keep state per parameter in
    ``wrapper.state[parameter]``.

    Args:
        given: an optimizer, a wrapper whose ``step()`` steps one, or an :class:`Unwrapped`, which is
            returned unchanged.

    Returns:
        The optimizer, its parts and its wrappers.

    Raises:
        TypeError: ``given`` is not an optimizer and does not hold exactly one, or a wrapper keeps copies of
            weights outside ``state``, where they cannot be masked or cut.
    """
    if isinstance(given, Unwrapped):
        return given
    if isinstance(given, (LRScheduler, ReduceLROnPlateau)):
        raise TypeError(f"optimizer: got {_described(given)}, {_EXPECTED}; pass scheduler.optimizer")
    found, wrappers = _innermost(given)
    if found is None:
        raise TypeError(f"optimizer: got {_described(given)}, {_EXPECTED}")
    parts = tuple(held for _, held in _held(found))
    unwrapped = Unwrapped(found, (found, *parts, *wrappers), parts)
    for wrapper in wrappers:
        _check_wrapper(wrapper, found, unwrapped.states)
    return unwrapped


def _innermost(given: object) -> tuple[Optimizer | None, list[object]]:
    """The optimizer whose steps to process, and the wrappers around it from the outside in."""
    wrappers: list[object] = []
    current: object = given
    while True:
        inner = [(name, held) for name, held in _held(current) if all(held is not w for w in wrappers)]
        if _runs_hooks(current):
            # An optimizer that divides its parameters among inner optimizers is stepped as a whole.
            covering = [held for _, held in inner if _parameters(current) <= _parameters(held)]
            if len(covering) != 1:
                return current, wrappers  # type: ignore[return-value]
            wrappers.append(current)
            current = covering[0]
            continue
        if not inner or not callable(getattr(current, "step", None)):
            return None, wrappers
        if len(inner) > 1:
            names = ", ".join(f"{type(held).__name__} in {name!r}" for name, held in inner)
            raise TypeError(
                f"optimizer: got a {type(current).__name__} that holds {len(inner)} optimizers ({names}), "
                f"expected one; pass the one that trains the model, with all its parameters in groups"
            )
        wrappers.append(current)
        current = inner[0][1]


def _runs_hooks(value: object) -> bool:
    """Whether ``value`` is an optimizer whose steps call its registered hooks.

    Wrappers that imitate the class of the wrapped optimizer do not call them.
    """
    return (
        isinstance(value, Optimizer)
        and "_optimizer_step_pre_hooks" in vars(value)
        and bool(getattr(type(value).step, "hooked", False))
    )


def _held(wrapper: object) -> list[tuple[str, Any]]:
    """Optimizers and optimizer wrappers in attributes of ``wrapper`` or in containers there, each once."""
    found: dict[int, tuple[str, Any]] = {}
    for name, value in _attributes(wrapper):
        for candidate in _entries(value):
            if candidate is not wrapper and _steps_one(candidate):
                found.setdefault(id(candidate), (name, candidate))
    return list(found.values())


def _steps_one(value: object) -> bool:
    """Whether ``value`` is an optimizer, or a wrapper with ``step`` and ``param_groups`` that holds one."""
    if isinstance(value, Optimizer):
        return True
    if isinstance(value, (type, torch.nn.Module, LRScheduler, ReduceLROnPlateau, Tensor)):
        return False
    if not callable(getattr(type(value), "step", None)) or not hasattr(value, "param_groups"):
        return False
    return any(isinstance(entry, Optimizer) or _steps_one(entry) for _, entry in _attributes(value))


def _attributes(value: object) -> Iterator[tuple[str, Any]]:
    """Instance attributes, including those in slots. Properties and ``__getattr__`` are not called."""
    if isinstance(value, type):
        return
    yield from vars(value).items() if hasattr(value, "__dict__") else ()
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


def _entries(value: object) -> Iterator[Any]:
    """The values of a container, or ``value`` itself."""
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value
    else:
        yield value


def _parameters(optimizer: Any) -> set[int]:
    """``id`` of each parameter in the groups of ``optimizer``."""
    groups = getattr(optimizer, "param_groups", ())
    return {id(param) for group in groups for param in group["params"]}


def _distinct_states(holders: tuple[object, ...]) -> tuple[State, ...]:
    """The mappings ``state`` of the holders, each once."""
    found: dict[int, State] = {}
    for holder in holders:
        state = getattr(holder, "state", None)
        if isinstance(state, MutableMapping):
            found.setdefault(id(state), state)
    return tuple(found.values())


def _check_wrapper(wrapper: object, optimizer: Optimizer, states: tuple[State, ...]) -> None:
    """Check that the wrapper keeps no copies of weights outside ``state``, where nothing masks or cuts them.

    Raises:
        TypeError: an attribute holds tensors of the parameters' shapes that are not parameters.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    own, shapes = set(map(id, params)), {param.shape for param in params if param.numel() > 1}
    for name, value in _attributes(wrapper):
        if name == "param_groups" or any(value is state for state in states):
            continue
        tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        copies = [tensor for tensor in tensors if id(tensor) not in own and tensor.shape in shapes]
        if copies:
            raise TypeError(
                f"optimizer: got a {type(wrapper).__name__} that keeps {len(copies)} tensors of parameters' "
                f"shapes in {name!r}, expected them in its state[parameter], where their masked rows are "
                f"zeroed; keep them there, or pass the {type(optimizer).__name__} inside and step that"
            )


def _described(value: object) -> str:
    """``value`` in words, for messages."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = getattr(value, "__name__", None)
    return type(value).__name__ if name is None else f"{type(value).__name__} {name!r}"
