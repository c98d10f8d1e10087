"""Row tables for external optimizers: a statistics pass before each step and a mask pass after it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsekern.distributed.tensors import local
from sparsekern.kernels.ops import channel_moments_, step_
from sparsekern.kernels.options import MASK, STATISTICS, MaskOptions, StatisticsOptions
from sparsekern.kernels.rows import Rows, RowTable
from sparsekern.optim.lists import check_table, rate, state_tensors

StepArguments = tuple[tuple[Any, ...], dict[str, Any]] | None

_hooked: weakref.WeakKeyDictionary[Optimizer, list[RowHooks]] = weakref.WeakKeyDictionary()


def attach_hooks(optimizer: Optimizer, table: RowTable) -> RowHooks:
    """Process ``table`` around every step of an optimizer without support for rows.

    Before the step, statistics are computed from its gradients. If the step has a closure, the gradients are
    those of the closure's first call. If GradScaler leaves unscaling to the optimizer, they are unscaled.
    After the step, rows are multiplied by ``1 - lr * penalty``, fading rows fade further, and masked rows
    are set to zero. ``lr`` is that of the parameter's group, or 1 in groups without one. Parameters without
    a gradient are not changed.

    Masked rows and their state are set to zero now and after ``load_state_dict``. Masked rows are also set to
    zero before a closure is called again within one step, so that a line search evaluates the masked model.
    Several tables with different parameters can be attached.

    Args:
        optimizer: any :class:`torch.optim.Optimizer`.
        table: rows of its parameters; rows of other parameters stay as they are.

    Returns:
        A handle whose ``remove()`` removes the hooks. Pickles and copies of the optimizer have no hooks.

    Raises:
        TypeError: ``optimizer`` is not a :class:`torch.optim.Optimizer`.
        ValueError: none of the table's parameters is in the optimizer.
        RuntimeError: the optimizer already has hooks of a table with one of these parameters.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    check_table(optimizer, table, [hooks.table for hooks in _hooked.get(optimizer, ())])
    return RowHooks(optimizer, table)


class RowHooks:
    """Hooks that process a table around an optimizer's steps; :meth:`remove` removes them.

    Attributes:
        table: the table that the next step processes.
    """

    def __init__(self, optimizer: Optimizer, table: RowTable) -> None:
        self.table = table
        # Groups, parameters and rows of the current step; empty when found_inf skips the step.
        self._taken: list[tuple[dict[str, Any], list[Tensor], Rows]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_load_state_dict_post_hook(self._zero_masked),
        ]
        self._optimizer = weakref.ref(optimizer)
        _hooked.setdefault(optimizer, []).append(self)
        self._zero_masked(optimizer)

    def remove(self) -> None:
        """Remove the hooks from the optimizer."""
        for handle in self._handles:
            handle.remove()
        optimizer = self._optimizer()
        if optimizer is not None and self in _hooked.get(optimizer, ()):
            _hooked[optimizer].remove(self)

    def replace(self, table: RowTable) -> None:
        """Continue with ``table``, which describes parameters whose shapes have changed.

        The hooks stay registered, because a step's hooks may call this method.
        """
        self.table = table
        self._taken = []

    def _zero_masked(self, optimizer: Optimizer) -> None:
        """Set masked rows of the table and their optimizer state to zero."""
        self.table.zero_masked(state_tensors(optimizer.state))

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepArguments:
        """Step pre-hook: take statistics as soon as the gradients exist."""
        self._taken = []

        def take() -> None:
            if not self._taken:
                self._take(optimizer)

        return with_gradients(args, kwargs, take, self._mask_taken)

    @torch.no_grad()
    def _take(self, optimizer: Optimizer) -> None:
        """Take row statistics of all tracked gradients, and remember the rows for the end of the step."""
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        if found_inf is not None and found_inf.item() != 0:
            return
        scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        taken = [
            (group, params, self.table.rows_of(params))
            for group in optimizer.param_groups
            for params in self._lists(group)
        ]
        for group, params, rows in taken:
            if group.get("lr", 1.0) != 0:
                grads = [_gradient(param, group, scale) for param in params]
                step_(STATISTICS, (list(map(local, params)), grads), StatisticsOptions(), rows)
        self._taken = taken

    @torch.no_grad()
    def _mask_taken(self) -> None:
        """Set masked rows to zero between two calls of a step's closure, and change nothing else.

        An optimizer that updates parameters between the calls (a line search) does not know the masked rows.
        """
        if any(self.table.masked):
            for _, params, rows in self._taken:
                step_(MASK, (list(map(local, params)),), MaskOptions(0.0), rows)

    def _lists(self, group: dict[str, Any]) -> list[list[Tensor]]:
        """Tracked parameters of a group that have a gradient, one list per dtype."""
        lists: dict[torch.dtype, list[Tensor]] = {}
        for param in group["params"]:
            if param.grad is not None and id(param) in self.table.index:
                lists.setdefault(param.dtype, []).append(param)
        return list(lists.values())

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Step post-hook: apply penalty, fade-out and masks, then update the means per channel."""
        for group, params, rows in self._taken:
            lr = rate(group.get("lr", 1.0), params[0].device)
            step_(MASK, (list(map(local, params)),), MaskOptions(lr), rows)
        self._taken = []
        channel_moments_(self.table)


def with_gradients(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    act: Callable[[], None],
    before: Callable[[], None] | None = None,
) -> StepArguments:
    """Call ``act`` when the gradients of a step exist; for use in a step pre-hook.

    Without a closure ``act`` runs immediately. With one, ``act`` runs after each call of the closure.

    Args:
        args: positional arguments of the step, the optimizer first.
        kwargs: keyword arguments of the step.
        act: the function to call.
        before: a function to call before each call of the closure, or None.

    Returns:
        The arguments for the step, with a wrapped closure; None if the arguments stay the same.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        act()
        return None

    @functools.wraps(closure)
    def followed() -> Any:
        if before is not None:
            before()
        loss = closure()
        act()
        return loss

    if len(args) > 1:
        return (args[0], followed, *args[2:]), kwargs
    return args, kwargs | {"closure": followed}


def _gradient(param: Tensor, group: dict[str, Any], scale: Tensor | None) -> Tensor:
    """The gradient that the step descends: divided by ``scale``, and negated for ``maximize``."""
    assert param.grad is not None
    grad = local(param.grad)
    if scale is not None:
        grad = grad / scale.to(grad.device, grad.dtype)
    return -grad if group.get("maximize") else grad
