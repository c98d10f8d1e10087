"""Optimizer steps inside the backward pass: each gradient is used and freed as soon as it is complete."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparsekern.optim.base import RowOptimizer
from sparsekern.optim.unwrap import unwrap_optimizer

_working: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def in_backward(optimizer: RowOptimizer) -> InBackward:
    """Update each parameter as soon as its gradient is complete, during ``loss.backward()``.

    The training loop does not change. ``optimizer.step()`` ends the step: it computes means per channel, runs
    hooks and handles gradients that did not come from a backward pass. The result equals that of ``step()``
    alone bit for bit. The gradients never exist all at once: each is freed after its parameter's update.
    Until the next ``step()`` or ``zero_grad()`` a tensor without memory takes its place.

    This placeholder raises an error for every operation that needs the gradient after the update: a second
    backward pass before ``step()`` (gradient accumulation), clipping by the norm of all gradients, and
    ``GradScaler.unscale_``. ``step()`` raises an error for ``GradScaler.step``. At the time of these errors
    the parameters are updated already.

    Args:
        optimizer: an optimizer of :mod:`sparsekern.optim`, or a wrapper of one. ``step()`` steps parameters
            that are added to it later.

    Returns:
        A handle whose ``remove()`` moves all work back to ``step()``.

    Raises:
        TypeError: the optimizer is of another kind.
        RuntimeError: the optimizer works in the backward pass already, or several processes train together:
            their gradients are averaged only after this update.
    """
    optimizer = unwrap_optimizer(optimizer).optimizer  # type: ignore[assignment]
    if not isinstance(optimizer, RowOptimizer):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}, expected one of sparsekern.optim")
    if optimizer in _working:
        raise RuntimeError("optimizer: works in the backward pass already, expected one that does not")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        raise RuntimeError(
            f"in_backward: got {torch.distributed.get_world_size()} processes, expected one: gradients "
            f"are averaged over processes only after they are complete in each"
        )
    return InBackward(optimizer)


class InBackward:
    """Handle of an optimizer's updates in the backward pass; :meth:`remove` ends them."""

    def __init__(self, optimizer: RowOptimizer) -> None:
        self._optimizer = optimizer
        self._group_of: dict[Tensor, int] = {}
        self._handles: list[RemovableHandle] = [optimizer.register_step_pre_hook(self._end)]
        for index, group in enumerate(optimizer.param_groups):
            for param, times in Counter(group["params"]).items():
                # A parameter that occurs twice in a group is stepped twice with one gradient, by step().
                if times == 1 and param.requires_grad and param.is_leaf:
                    self._group_of[param] = index
                    self._handles.append(param.register_post_accumulate_grad_hook(self._update))
        _working.add(optimizer)

    def remove(self) -> None:
        """Move all work back to ``step()``."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _working.discard(self._optimizer)

    @torch.no_grad()
    def _update(self, param: Tensor) -> None:
        """Hook on a complete gradient: step the parameter and free the gradient."""
        self._optimizer.step_parameter(self._group_of[param], param)
        param.grad = UsedGradient(param)

    def _end(self, optimizer: Optimizer, *_: Any) -> None:
        """Step pre-hook: remove the placeholders; refuse a step by GradScaler."""
        for param in self._group_of:
            if type(param.grad) is UsedGradient:
                param.grad = None
        if getattr(optimizer, "found_inf", None) is not None:
            raise RuntimeError(
                "in_backward: got a step by GradScaler, expected a plain one: a scaler skips updates, and "
                "these have been made"
            )


class UsedGradient(Tensor):
    """Placeholder in ``.grad`` for a used and freed gradient: it has the shape and dtype, but no memory."""

    @staticmethod
    def __new__(cls, param: Tensor) -> UsedGradient:
        """Create the placeholder for the gradient of ``param``."""
        return Tensor._make_wrapper_subclass(
            cls, param.shape, strides=param.stride(), dtype=param.dtype, device=param.device
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"UsedGradient(shape={list(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        """Refuse every operation.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"grad: got {func} on a gradient that in_backward has used and freed, expected no use of it "
            f"before the next step() or zero_grad(): gradient accumulation, clipping by a global norm and "
            f"GradScaler do not work with in_backward"
        )


def works_in_backward(optimizer: Optimizer) -> bool:
    """Whether the optimizer updates parameters in the backward pass, so that a step finds no gradients."""
    return optimizer in _working
