"""What an optimizer keeps per parameter, cut as the parameter is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
"""``(parameter, name, value, plan) -> smaller value`` for state whose shape says nothing about its
parameter's. Called before anything is changed; has to leave its arguments as they are."""


@dataclass(frozen=True)
class _Entry:
    """One value of ``optimizer.state[p]`` and what takes its place: other data in it, or another value."""

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
    """What is left of an optimizer's state, already cut."""

    def __init__(self, entries: list[_Entry]) -> None:
        self._entries = entries

    def carry_out(self, undo: ExitStack) -> None:
        """Make the state smaller, in the same tensors where the cut is ours.

        ``undo`` is told what restores it.
        """
        for entry in self._entries:
            entry.carry_out(undo)


def _set_data(tensor: Tensor, data: Tensor) -> None:
    tensor.data = data


def follows_shape(value: Any, param: Tensor) -> bool:
    """Whether state of ``param`` can be cut as it is: no tensors, one of its shape, or a single number."""
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
    """Everything of the optimizer's state that has to get smaller, cut. Changes nothing.

    Args:
        optimizer: only state of its parameters is looked at, and what wrappers keep of them.
        parts: by ``id`` of a parameter, what stays of it; others stay whole.
        names: of the parameters, by ``id``.
        cutter: for state of unknown shape.

    Raises:
        TypeError: ``optimizer`` is none, see :func:`sparsekern.optim.unwrap_optimizer`.
        ValueError: there is such state, and no cutter.
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
    """Raise a ValueError for state of ``param``, which stays whole, that holds more than that parameter's."""
    for values in (state[param] for state in unwrapped.states if param in state):
        for name, value in values.items():
            leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
            if any(leaf.numel() > max(1, param.numel()) for leaf in leaves):
                raise ValueError(_unknown(unwrapped.optimizer, "of this shape", param, name, value))


def _part_of_state(value: Any, part: TensorPlan) -> TensorPlan | None:
    """What stays of a state tensor; None where its shape does not tell."""
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
        f"optimizer: {type(optimizer).__name__} keeps {name!r} of parameter {parameter} "
        f"{list(param.shape)} as {what}, expected the parameter's shape; state_cutter has to cut it"
    )
