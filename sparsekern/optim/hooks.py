"""Rows beside any other optimizer: one pass of statistics before its step, one of masks after."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsekern.distributed.tensors import local
from sparsekern.kernels.ops import channel_moments_, row_mask_, row_statistics_
from sparsekern.kernels.rows import Rows, RowTable
from sparsekern.optim.lists import check_table, rate, state_tensors

StepArguments = tuple[tuple[Any, ...], dict[str, Any]] | None

_hooked: weakref.WeakKeyDictionary[Optimizer, list[RowHooks]] = weakref.WeakKeyDictionary()


def attach_hooks(optimizer: Optimizer, table: RowTable) -> RowHooks:
    """Do the work of ``table`` around every step of an optimizer that knows nothing of rows.

    Statistics are taken from the gradients as the step finds them: after its closure if it has one
    (the first call counts), unscaled if GradScaler leaves that to the optimizer. Afterwards rows are
    shrunk by ``1 - lr * penalty``, decline, and masked ones are set to zero again; ``lr`` is that of
    the parameter's group, or 1 where groups have none. Parameters without a gradient are left alone.
    Masked rows and their state are set to zero now, after ``load_state_dict``, and before a closure is called
    again within one step, so that a line search looks at the masked model. Several tables of different
    parameters can be attached.

    Args:
        optimizer: any :class:`torch.optim.Optimizer`.
        table: rows of its parameters; rows of other parameters stay as they are.

    Returns:
        A handle whose ``remove()`` undoes this. Pickles and copies of the optimizer have no hooks.

    Raises:
        TypeError: ``optimizer`` is no :class:`torch.optim.Optimizer`.
        ValueError: none of the table's parameters is in it.
        RuntimeError: it has hooks of a table with one of these parameters already.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    check_table(optimizer, table, [hooks.table for hooks in _hooked.get(optimizer, ())])
    return RowHooks(optimizer, table)


class RowHooks:
    """Hooks that carry a table around an optimizer's steps, to be undone by :meth:`remove`.

    Attributes:
        table: what the next step works with.
    """

    def __init__(self, optimizer: Optimizer, table: RowTable) -> None:
        self.table = table
        # What the step under way goes over; empty when it changes nothing (found_inf).
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
        """Leave the optimizer as it was without the table."""
        for handle in self._handles:
            handle.remove()
        optimizer = self._optimizer()
        if optimizer is not None and self in _hooked.get(optimizer, ()):
            _hooked[optimizer].remove(self)

    def replace(self, table: RowTable) -> None:
        """Go on with another table, of parameters that have changed their shape since.

        The hooks stay where they are: this is also called from within a step's hooks.
        """
        self.table = table
        self._taken = []

    def _zero_masked(self, optimizer: Optimizer) -> None:
        self.table.zero_masked(state_tensors(optimizer.state))

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepArguments:
        self._taken = []

        def take() -> None:
            if not self._taken:
                self._take(optimizer)

        return with_gradients(args, kwargs, take, self._mask_taken)

    @torch.no_grad()
    def _take(self, optimizer: Optimizer) -> None:
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
                row_statistics_(list(map(local, params)), grads, rows=rows)
        self._taken = taken

    @torch.no_grad()
    def _mask_taken(self) -> None:
        """Set masked rows to zero between two calls of a step's closure, and change nothing else.

        An optimizer that moves parameters between them (a line search) does not know which rows are masked.
        """
        if any(self.table.masked):
            for _, params, rows in self._taken:
                row_mask_(list(map(local, params)), lr=0.0, rows=rows)

    def _lists(self, group: dict[str, Any]) -> list[list[Tensor]]:
        """Tracked parameters of a group that have a gradient, parted by dtype."""
        lists: dict[torch.dtype, list[Tensor]] = {}
        for param in group["params"]:
            if param.grad is not None and id(param) in self.table.index:
                lists.setdefault(param.dtype, []).append(param)
        return list(lists.values())

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for group, params, rows in self._taken:
            lr = rate(group.get("lr", 1.0), params[0].device)
            row_mask_(list(map(local, params)), lr=lr, rows=rows)
        self._taken = []
        channel_moments_(self.table)


def with_gradients(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    act: Callable[[], None],
    before: Callable[[], None] | None = None,
) -> StepArguments:
    """For hooks before a step with these arguments: ``act`` once the gradients of the step are there.

    That is now, or where the step is given a closure, each time that it has called it. ``before`` is done
    before each of these calls.

    Returns:
        The arguments to go on with, None for the same.
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
    """The gradient that the step goes down, which ``maximize`` and a scale change."""
    assert param.grad is not None
    grad = local(param.grad)
    if scale is not None:
        grad = grad / scale.to(grad.device, grad.dtype)
    return -grad if group.get("maximize") else grad
