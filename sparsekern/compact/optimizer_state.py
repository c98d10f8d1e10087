"""Cutting the optimizer state of a parameter in the same way as the parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from sparsekern.compact.plan import TensorPlan
from sparsekern.compact.surgery import cut
from sparsekern.optim import Unwrapped, unwrap_optimizer

StateCutter = Callable[[Tensor, str, Any, TensorPlan], Any]
"""``(parameter, name, value, plan) -> smaller value`` for state whose shape does not match its parameter.
It is called before anything changes and must not modify its arguments."""


@dataclass(frozen=True)
class _Entry:
    """One value of ``optimizer.state[p]`` and its replacement.

    Attributes:
        state: the dict ``optimizer.state[p]``.
        name: the key of the value.
        data: new data for the same tensor; None where ``value`` replaces the old value.
        value: the new value where ``data`` is None.
    """

    state: dict[str, Any]
    name: str
    data: Tensor | None
    value: Any

    def carry_out(self, undo: ExitStack) -> None:
        old = self.state[self.name]
        if self.data is None:
            undo.callback(self.state.__setitem__, self.name, old)
            self.state[self.name] = self.value
        else:
            undo.callback(_set_data, old, old.data)
            _set_data(old, self.data)


class PreparedState:
    """The cut optimizer state, ready to replace the present one."""

    def __init__(self, entries: list[_Entry]) -> None:
        self._entries = entries

    def carry_out(self, undo: ExitStack) -> None:
        """Replace the state by the cut state.

        Tensors that this module cut stay the same objects; values of a ``StateCutter`` are new objects.

        Args:
            undo: receives the callbacks that restore the state.
        """
        for entry in self._entries:
            entry.carry_out(undo)


def _set_data(tensor: Tensor, data: Tensor) -> None:
    tensor.data = data


def drop_parameters(optimizer: object, removed: Sequence[Tensor], undo: ExitStack) -> None:
    """Take parameters and their state out of an optimizer. Groups stay, also those that become empty.

    Args:
        optimizer: the optimizer, possibly wrapped.
        removed: the parameters; tensors that it does not hold are ignored.
        undo: receives the callbacks that restore the optimizer.
    """
    gone = {id(tensor) for tensor in removed}
    if not gone:
        return
    unwrapped = unwrap_optimizer(optimizer)
    for held in (unwrapped.optimizer, *unwrapped.parts):
        for group in held.param_groups:
            before = list(group["params"])
            undo.callback(group["params"].__setitem__, slice(None), before)
            group["params"][:] = [param for param in before if id(param) not in gone]
    for states in unwrapped.states:
        for param in [param for param in states if id(param) in gone]:
            undo.callback(states.__setitem__, param, states[param])
            del states[param]


def follows_shape(value: Any, param: Tensor) -> bool:
    """Whether state of ``param`` can be cut without a ``StateCutter``.

    It can if it holds no tensor, a tensor that follows the parameter's shape, or a single number.
    """
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
        return True
    return _part_of_state(value, TensorPlan(tuple(param.shape))) is not None


@torch.no_grad()
def prepare_state(
    optimizer: object,
    parts: Mapping[int, TensorPlan],
    names: Mapping[int, str],
    cutter: StateCutter | None,
) -> PreparedState:
    """Cut all optimizer state that follows a cut parameter, without changing the optimizer.

    Args:
        optimizer: the optimizer, possibly wrapped; only state of its parameters is read, including the state
            that wrappers keep.
        parts: the part of each parameter that stays, by the parameter's ``id``; other parameters stay whole.
        names: names of the parameters, by ``id``.
        cutter: cuts state of unknown shape.

    Returns:
        The cut state.

    Raises:
        TypeError: ``optimizer`` is not an optimizer, see :func:`sparsekern.optim.unwrap_optimizer`.
        ValueError: there is state of unknown shape and no cutter.
    """
    unwrapped = unwrap_optimizer(optimizer)
    entries: list[_Entry] = []
    for param in (param for group in unwrapped.optimizer.param_groups for param in group["params"]):
        part = parts.get(id(param))
        if part is None or not part.keep:
            if cutter is None:
                _check_own(unwrapped, param)
            continue
        for state in (values[param] for values in unwrapped.states if param in values):
            for name, value in state.items():
                if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
                    continue
                own = _part_of_state(value, part)
                if own is None:
                    if cutter is None:
                        raise ValueError(
                            _unknown(unwrapped.optimizer, repr(names[id(param)]), param, name, value)
                        )
                    entries.append(_Entry(state, name, None, cutter(param, name, value, part)))
                elif own.keep:
                    entries.append(_Entry(state, name, cut(value, own), value))
    return PreparedState(entries)


def _check_own(unwrapped: Unwrapped, param: Tensor) -> None:
    """Check the state of ``param``, a parameter that stays whole.

    Raises:
        ValueError: the state has more elements than the parameter, so it belongs to other parameters too.
    """
    for values in (state[param] for state in unwrapped.states if param in state):
        for name, value in values.items():
            leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
            if any(leaf.numel() > max(1, param.numel()) for leaf in leaves):
                raise ValueError(_unknown(unwrapped.optimizer, "of this shape", param, name, value))


def _part_of_state(value: Any, part: TensorPlan) -> TensorPlan | None:
    """The part of a state tensor that stays; None where its shape does not follow the parameter's."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    shape = tuple(value.shape)
    if value.numel() == 1:
        return TensorPlan(shape)
    fits = len(shape) == len(part.shape) and all(
        size in (1, full) for size, full in zip(shape, part.shape, strict=True)
    )
    if not fits:
        return None
    return TensorPlan(shape, {dim: kept for dim, kept in part.keep.items() if shape[dim] != 1})


def _unknown(optimizer: Optimizer, parameter: str, param: Tensor, name: str, value: Any) -> str:
    what = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    return (
        f"optimizer: got a {type(optimizer).__name__} whose state {name!r} of parameter {parameter} "
        f"{list(param.shape)} is {what}, expected the parameter's shape; pass a state_cutter that cuts it"
    )
