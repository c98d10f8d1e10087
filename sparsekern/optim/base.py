"""What the optimizers share: lists kept between steps, the step itself, and tables of rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from sparsekern.distributed.tensors import is_sharded, local, wrapped_like
from sparsekern.kernels.ops import channel_moments_
from sparsekern.kernels.rows import RowTable, RowView
from sparsekern.optim.kept import Kept
from sparsekern.optim.lists import (
    TensorList,
    check_group,
    check_parameter,
    check_table,
    check_wrapped,
    fit_state,
    split,
    state_tensors,
)

_attachments = itertools.count(1)


class RowOptimizer(Optimizer):
    """Base of the optimizers that make a step and the work of tables of rows in one pass.

    A subclass names its state, makes it, and calls its operation: :meth:`_state_names`,
    :meth:`_new_state`, :meth:`_update`.
    """

    # Read by GradScaler: the kernels unscale and skip by themselves, as torch's fused ones do.
    _step_supports_amp_scaling = True

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        name = type(self).__name__
        if defaults["differentiable"]:
            raise RuntimeError(
                f"{name}: got differentiable=True, expected False: `fused` does not support "
                f"`differentiable`, and this optimizer always is fused"
            )
        if defaults["fused"] and defaults["foreach"]:
            raise RuntimeError(f"{name}: `fused` and `foreach` cannot be `True` together.")
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Start without lists and without tables."""
        self._kept: Kept | None = None
        self._sharded = False
        self._tables: tuple[RowTable, ...] = ()
        # Another one for every attachment: a compiled step has the positions of rows as constants,
        # and torch.compile never stops guarding strings by value.
        self._attachment = ""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._kept = None
        if not hasattr(self, "_tables"):
            self._forget()
        for group in self.param_groups:
            self._sharded |= any(map(is_sharded, group["params"]))
            group.setdefault("maximize", False)
            group.setdefault("foreach", None)
            group.setdefault("differentiable", False)
            group.setdefault("fused", None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; see :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            RuntimeError: a parameter wraps other tensors and is no DTensor, or is one that is a partial sum;
                the group has not been added.
        """
        super().add_param_group(param_group)
        self._sharded |= any(map(is_sharded, self.param_groups[-1]["params"]))
        try:
            check_wrapped(type(self).__name__, len(self.param_groups) - 1, param_group)
        except RuntimeError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; state dicts of the optimizer of the same name in ``torch.optim`` fit.

        With tables attached, masked rows and their state are zero again afterwards.
        """
        super().load_state_dict(state_dict)
        for table in self._tables:
            self._zero_masked(table)

    @property
    def tables(self) -> tuple[RowTable, ...]:
        """What is attached, in order."""
        return self._tables

    def attach(self, table: RowTable) -> Attachment:
        """Do the work of ``table`` in every step from now on: statistics, penalty, decline, masks.

        Several tables of different parameters can be attached: a list of parameters that one native
        call takes has rows of one table. Masked rows and their state are set to zero. Tables stay out of
        ``state_dict``, pickles and deep copies of the optimizer: a copy has none, and steps as
        ``torch.optim`` would.

        Args:
            table: rows of parameters of this optimizer; rows of other parameters stay as they are.

        Returns:
            A handle whose ``remove()`` detaches this table.

        Raises:
            RuntimeError: a table with one of its parameters is attached already.
            ValueError: none of the table's parameters is in this optimizer.
        """
        check_table(self, table, self._tables)
        self._set_tables((*self._tables, table))
        self._zero_masked(table)
        return Attachment(self, table)

    def detach(self) -> None:
        """Step as ``torch.optim`` would from now on. Without tables nothing happens."""
        self._set_tables(())

    def _set_tables(self, tables: tuple[RowTable, ...]) -> None:
        self._tables = tables
        self._kept = None
        self._attachment = f"tables {next(_attachments)}" if tables else ""

    def _zero_masked(self, table: RowTable) -> None:
        table.zero_masked(state_tensors(self.state))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of all parameters that have a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returned.

        Raises:
            RuntimeError: a sparse or complex gradient, an unsupported dtype, or state that does not
                fit its parameter; nothing has changed then.
        """
        if self._sharded:
            return self._uncompiled_step(closure)
        return self._step(closure)

    @torch.compiler.disable
    def _uncompiled_step(self, closure: Callable[[], float] | None) -> float | None:
        # A trace would take the local parts of parameters and gradients for constants.
        return self._step(closure)

    def _step(self, closure: Callable[[], float] | None) -> float | None:
        if "capturable" in self.defaults:
            self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None:
            # GradScaler adds up over devices, kernels compare with 1.
            found_inf = found_inf.clamp(max=1)
        for tensors, grads in self._lists():
            device = tensors.params[0].device
            scale, inf = _on(grad_scale, device), _on(found_inf, device)
            self._update(self.param_groups[tensors.group], tensors, grads, scale, inf)
        for table in self._tables:
            channel_moments_(table)
        return loss

    def step_parameter(self, index: int, param: Tensor) -> None:
        """What a step does to one parameter with a gradient; ``step()`` has to end that step.

        Args:
            index: the group that holds it.
            param: the parameter; its gradient stays as it is.

        Raises:
            RuntimeError: as :meth:`step`.
        """
        group = self.param_groups[index]
        check_parameter(type(self).__name__, index, group, param)
        assert param.grad is not None
        state = {name: self._state_of(param, name) for name in self._state_names(group)}
        first = any(value is None for value in state.values())
        kept = {} if first else {name: [local(value)] for name, value in state.items() if value is not None}
        table = next((table for table in self._tables if id(param) in table.index), None)
        rows = None if table is None else table.rows_of([param])
        tensors = TensorList(index, first, [local(param)], [0], kept, rows, [param])
        self._update(group, tensors, [local(param.grad)], None, None)

    def _lists(self) -> list[tuple[TensorList, list[Tensor]]]:
        """What one step takes: every list with its gradients."""
        if torch.compiler.is_compiling():
            return self._traced_lists()
        groups, state = self.param_groups, self.state
        names = [self._state_names(group) for group in groups]
        kept = self._kept
        grads = None if kept is None else kept.grads(groups, names, state)
        if kept is None or grads is None:
            kept, grads = self._keep(names)
        if kept.sharded:
            grads = list(map(local, grads))
        return [(tensors, tensors.pick(grads)) for tensors in kept.lists]

    def _keep(self, names: list[tuple[str, ...]]) -> tuple[Kept, list[Tensor]]:
        """New lists, and all gradients that there are."""
        self._kept = None
        for index, group in enumerate(self.param_groups):
            check_group(type(self).__name__, index, group)
        lists: list[TensorList] = []
        offset = 0
        for index, group in enumerate(self.param_groups):
            parts, grads = self._lists_of(index, group, offset)
            lists += parts
            offset += len(grads)
        self._kept = Kept.of(lists, self.param_groups, names, self.state)
        every = (param.grad for group in self.param_groups for param in group["params"])
        return self._kept, [grad for grad in every if grad is not None]

    def _traced_lists(self) -> list[tuple[TensorList, list[Tensor]]]:
        result = []
        for index, group in enumerate(self.param_groups):
            parts, grads = self._lists_of(index, group, 0)
            result += [(tensors, tensors.pick(grads)) for tensors in parts]
        return result

    def _lists_of(
        self, index: int, group: dict[str, Any], offset: int
    ) -> tuple[list[TensorList], list[Tensor]]:
        """Lists of one group, and all its gradients, the first of which is number ``offset``."""
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buckets: list[int] = []
        numbers: list[int] = []
        starts: list[int] = []
        dims: list[int] = []
        columns: dict[str, list[Any]] = {name: [] for name in self._state_names(group)}
        self._init_group(group, params, grads, buckets, numbers, starts, dims, *columns.values())
        tables = self._tables if self._attachment else ()
        lists = split(index, params, buckets, columns, tables, numbers, starts, dims, offset=offset)
        if not torch.compiler.is_compiling():
            owners = [param for param in group["params"] if param.grad is not None]
            for tensors in lists:
                tensors.owners = [owners[i - offset] for i in tensors.where]
        return lists, grads

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        buckets: list[int],
        numbers: list[int],
        starts: list[int],
        dims: list[int],
        *columns: list[Any],
    ) -> None:
        """Fill the lists with what of the group has a gradient, and make the state it lacks.

        By this name because torch.compile runs it in Python and maps the lists back into its trace;
        so whatever needs Python proper (identities, checks) is done here.

        Args:
            buckets: per parameter the number of the list that it goes to.
            numbers: per parameter the index of its table; 0 where none has its rows.
            starts, dims: per parameter where its rows are, as in ``Rows``.
            columns: per name of :meth:`_state_names` the state, None where the step is to make it.
        """
        names = self._state_names(group)
        index = next(i for i, other in enumerate(self.param_groups) if other is group)
        check_group(type(self).__name__, index, group)
        bucket_of: dict[Any, int] = {}
        seen: dict[int, int] = {}
        for param in group["params"]:
            if param.grad is None:
                continue
            state = [self._state_of(param, name) for name in names]
            # A parameter that the group has twice is stepped twice, as in torch: in two calls.
            turn = seen[id(param)] = seen.get(id(param), -1) + 1
            number, view = self._view_of(param)
            kind = (param.device, param.dtype, turn, any(value is None for value in state), number)
            params.append(local(param))
            grads.append(local(param.grad))
            buckets.append(bucket_of.setdefault(kind, len(bucket_of)))
            numbers.append(number)
            starts.append(-1 if view is None else view.start)
            dims.append(0 if view is None else view.dim)
            for column, value in zip(columns, state, strict=True):
                column.append(value if value is None else local(value))

    def _view_of(self, param: Tensor) -> tuple[int, RowView | None]:
        """The index of the table that has rows of ``param``, and these; 0 and None where none has."""
        for number, table in enumerate(self._tables):
            if (view := table.index.get(id(param))) is not None:
                return number, view
        return 0, None

    def _store(self, tensors: TensorList, name: str, values: Sequence[Tensor]) -> None:
        """Keep what a step has made as the state ``name`` of the list's parameters."""
        for param, value in zip(tensors.owners or tensors.params, values, strict=True):
            self.state[param][name] = wrapped_like(value, param)

    def _state_of(self, param: Tensor, name: str) -> Tensor | None:
        """State made if it is missing and fitted if it came from elsewhere; stored in both cases."""
        state = self.state[param]
        value = state.get(name)
        value = self._new_state(name, param) if value is None else fit_state(name, value, param)
        if value is not None:
            state[name] = value
        return value

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names in ``state[p]`` of what a step of the group uses, as torch has them."""
        raise NotImplementedError

    def _new_state(self, name: str, param: Tensor) -> Tensor | None:
        """What a parameter has before its first step; None if that step is to make it."""
        raise NotImplementedError

    def _update(
        self,
        group: dict[str, Any],
        tensors: TensorList,
        grads: list[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """One step of one list."""
        raise NotImplementedError


class Attachment:
    """A table's attachment to an optimizer, to be undone by :meth:`remove`."""

    def __init__(self, optimizer: RowOptimizer, table: RowTable) -> None:
        self._optimizer = optimizer
        self._table = table

    def remove(self) -> None:
        """Detach this table, unless it was already."""
        left = tuple(table for table in self._optimizer.tables if table is not self._table)
        if len(left) < len(self._optimizer.tables):
            self._optimizer._set_tables(left)

    def replace(self, table: RowTable) -> None:
        """Go on with another table, of parameters that have changed their shape since."""
        self.remove()
        self._optimizer.attach(table)
        self._table = table


def _on(value: Tensor | None, device: torch.device) -> Tensor | None:
    if value is None or value.device == device:
        return value
    return value.to(device, non_blocking=True)
