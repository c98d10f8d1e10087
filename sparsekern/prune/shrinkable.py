"""Checks for a training that shrinks: whether the model and the optimizer's state can be cut."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from sparsekern.compact import check_cuttable
from sparsekern.compact.optimizer_state import StateCutter, follows_shape
from sparsekern.optim import RowOptimizer, Unwrapped
from sparsekern.prune.trial_steps import copy_of

# Sizes of the first dimension of stand-ins; each further dimension is 1 larger, so that all differ.
_SIZES = (3, 5)
_ADVICE = (
    "expected state of each parameter's shape; pass shrink=False, or a state_cutter that cuts this state"
)


def check_shrinkable(
    model: nn.Module, unwrapped: Unwrapped, state_cutter: StateCutter | None
) -> StateCheck | None:
    """Check before a training that its model and its optimizer's state can be cut at every event.

    Args:
        model: the model without a wrapper.
        unwrapped: the optimizer inside its wrappers.
        state_cutter: cuts state of other shapes than its parameters; its presence ends the checks of state.

    Returns:
        A hook that checks the state of the first step; None if no check is needed.

    Raises:
        ValueError: the model cannot be cut, or a tensor of the optimizer's state has another shape than its
            parameter.
    """
    check_cuttable(model)
    if state_cutter is not None:
        return None
    _check_state(unwrapped)
    return StateCheck(unwrapped)


def _check_state(unwrapped: Unwrapped) -> None:
    """Check that each tensor of the optimizer's state has the shape of its parameter.

    This checks the state that exists. Two steps of copies with small parameters show the state that the
    optimizer will make. A copy that cannot step shows nothing; then :class:`StateCheck` checks later.

    Raises:
        ValueError: a tensor has another shape; the text names the optimizer and the state.
    """
    optimizer = unwrapped.optimizer
    if unwrapped.parts:
        raise ValueError(
            f"shrink: got True with {_named(optimizer)}, which divides its parameters among "
            f"{len(unwrapped.parts)} other optimizers, expected False, or an optimizer that updates all of "
            f"its parameters itself"
        )
    if isinstance(optimizer, RowOptimizer):
        return
    _check(optimizer, unwrapped)
    grown = []
    for size in _SIZES:
        probe = _stepped(optimizer, size)
        if probe is None:
            return
        _check(optimizer, Unwrapped(probe, (probe,), ()))
        grown.append({name: shapes for name, shapes in _held_shapes(probe)})
    for name in grown[0]:
        if grown[0][name] != grown[1].get(name):
            raise ValueError(
                f"optimizer: got {_named(optimizer)} with tensors in {name!r} whose sizes depend on those of "
                f"its parameters, {_ADVICE}"
            )


class StateCheck:
    """A hook after an optimizer's steps that checks the state made by the first step.

    It serves optimizers that cannot be copied, and those whose state depends on the size of a parameter.

    Raises:
        ValueError: a tensor of the state has another shape than its parameter.
    """

    def __init__(self, unwrapped: Unwrapped) -> None:
        self._unwrapped = unwrapped
        # A hook cannot remove itself while hooks are being called.
        self._done = False

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._done and any(self._unwrapped.states):
            _check(optimizer, self._unwrapped)
            self._done = True


def _check(optimizer: Optimizer, unwrapped: Unwrapped) -> None:
    """Raise a ValueError that names ``optimizer`` for state in ``unwrapped`` that follows no parameter."""
    for param, values in (item for state in unwrapped.states for item in state.items()):
        if not isinstance(param, Tensor) or not isinstance(values, dict):
            continue
        for name, value in values.items():
            if not follows_shape(value, param):
                raise ValueError(
                    f"optimizer: got {_named(optimizer)} whose state {name!r} of a parameter of shape "
                    f"{list(param.shape)} is {_kind(value)}, {_ADVICE}"
                )


def _stepped(optimizer: Optimizer, size: int) -> Optimizer | None:
    """A copy with small parameters after two steps, None if it cannot be made or cannot step."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    small = {
        id(p): Parameter(
            torch.zeros([size + dim for dim in range(p.dim())], dtype=p.dtype, device=p.device),
            requires_grad=p.requires_grad,
        )
        for p in params
    }
    devices = sorted({p.device for p in params if p.device.type == "cuda"}, key=str)
    try:
        with torch.random.fork_rng(devices):
            probe = copy_of(optimizer, small)
            for _ in range(2):
                for param in small.values():
                    param.grad = torch.ones_like(param) if param.requires_grad else None
                _step(probe)
    except Exception:  # a user's optimizer may raise anything without its model and data
        return None
    return probe


def _step(optimizer: Optimizer) -> None:
    if "closure" in inspect.signature(type(optimizer).step).parameters:
        optimizer.step(closure=lambda: torch.ones(()))  # type: ignore[arg-type, return-value]
    else:
        optimizer.step()


def _held_shapes(optimizer: Optimizer) -> Iterator[tuple[str, Sequence[torch.Size]]]:
    """Shapes of the tensors in each attribute and group, except parameters and state."""
    own = {id(param) for group in optimizer.param_groups for param in group["params"]}
    held = {name: v for name, v in vars(optimizer).items() if name not in ("state", "param_groups")}
    held |= {key: v for group in optimizer.param_groups for key, v in group.items() if key != "params"}
    for name, value in held.items():
        leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        yield name, [leaf.shape for leaf in leaves if id(leaf) not in own]


def _named(optimizer: Optimizer) -> str:
    return type(optimizer).__name__


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}"
