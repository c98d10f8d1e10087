"""The optimizer's step inside the backward pass: a gradient is used where it is made, and freed."""

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

    The training loop stays as it is: ``optimizer.step()`` ends the step (means per channel, hooks,
    gradients that did not come from a backward pass), and the result is that of ``step()`` alone,
    bit for bit. But the gradients never live all at once: each is freed when its parameter has been
    updated. Until the next ``step()`` or ``zero_grad()`` a tensor without memory stands in for it.

    That stand-in refuses what would come too late: a second backward pass before ``step()``
    (gradient accumulation), clipping by the norm of all gradients, ``GradScaler.unscale_``;
    ``GradScaler.step`` is refused by ``step()``. When such an error comes, parameters have been
    updated already.

    Args:
        optimizer: one of :mod:`sparsekern.optim`, also inside of a wrapper. Parameters that are added to
            it later are stepped by ``step()``.

    Returns:
        A handle whose ``remove()`` leaves all work to ``step()`` again.

    Raises:
        TypeError: another kind of optimizer.
        RuntimeError: the optimizer works in the backward pass already, or several processes train
            together: their gradients are averaged only after this.
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
    """An optimizer's work in the backward pass, to be undone by :meth:`remove`."""

    def __init__(self, optimizer: RowOptimizer) -> None:
        self._optimizer = optimizer
        self._group_of: dict[Tensor, int] = {}
        self._handles: list[RemovableHandle] = [optimizer.register_step_pre_hook(self._end)]
        for index, group in enumerate(optimizer.param_groups):
            for param, times in Counter(group["params"]).items():
                # One that the group has twice is stepped twice with one gradient: step() does that.
                if times == 1 and param.requires_grad and param.is_leaf:
                    self._group_of[param] = index
                    self._handles.append(param.register_post_accumulate_grad_hook(self._update))
        _working.add(optimizer)

    def remove(self) -> None:
        """Leave all work to ``step()`` again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _working.discard(self._optimizer)

    @torch.no_grad()
    def _update(self, param: Tensor) -> None:
        self._optimizer.step_parameter(self._group_of[param], param)
        param.grad = UsedGradient(param)

    def _end(self, optimizer: Optimizer, *_: Any) -> None:
        for param in self._group_of:
            if type(param.grad) is UsedGradient:
                param.grad = None
        if getattr(optimizer, "found_inf", None) is not None:
            raise RuntimeError(
                "in_backward: got a step by GradScaler, expected a plain one: a scaler skips updates, and "
                "these have been made"
            )


class UsedGradient(Tensor):
    """What stands in ``.grad`` for a gradient that was used and freed: its shape, and no memory."""

    @staticmethod
    def __new__(cls, param: Tensor) -> UsedGradient:
        """In place of the gradient of ``param``."""
        return Tensor._make_wrapper_subclass(
            cls, param.shape, strides=param.stride(), dtype=param.dtype, device=param.device
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"UsedGradient(shape={list(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        """Nothing can be computed with it.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"grad: got {func} on a gradient that in_backward has used and freed, expected no use of it "
            f"before the next step() or zero_grad(): gradient accumulation, clipping by a global norm and "
            f"GradScaler do not work with in_backward"
        )


def works_in_backward(optimizer: Optimizer) -> bool:
    """Whether the optimizer's parameters are updated in the backward pass, and have no gradient in a step."""
    return optimizer in _working
