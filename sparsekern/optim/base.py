"""Common base of the optimizers: lists cached between steps, the step itself, and attached row tables."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # unlike torch.compiler.disable it imports nothing yet
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from sparsekern.distributed.tensors import is_sharded, local, wrapped_like
from sparsekern.kernels.ops import channel_moments_, step_
from sparsekern.kernels.options import OPTIONS, UNSCALED, Scaling
from sparsekern.kernels.rows import RowTable, RowView
from sparsekern.optim.attachment import Attachment
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
from sparsekern.optim.options import GroupOptions, Source

_attachments = itertools.count(1)


class RowOptimizer(Optimizer):
    """Base of the optimizers that step parameters and process row tables in one pass over memory.

    A subclass says which op it calls (:attr:`_OP`) and with which state (:attr:`_STATE`), where the options
    of that op stand in a parameter group (:attr:`_RENAMED`), names the state of a group
    (:meth:`_state_names`) and creates it (:meth:`_new_state`).

    Attributes:
        _OP: number of the op in :mod:`sparsekern.kernels.options`.
        _STATE: keys of ``state[p]`` in the order of the op's lists behind ``params`` and ``grads``.
        _RENAMED: as in :class:`~sparsekern.optim.options.GroupOptions`.
    """

    _OP: ClassVar[int]
    _STATE: ClassVar[tuple[str, ...]]
    _RENAMED: ClassVar[dict[str, Source]] = {}

    # GradScaler reads this flag: the kernels unscale and skip steps themselves, like torch's fused ones.
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
        """Reset to no cached lists and no tables."""
        self._kept: Kept | None = None
        self._options = GroupOptions(OPTIONS[self._OP], self._RENAMED)
        self._sharded = False
        self._tables: tuple[RowTable, ...] = ()
        # Every attachment gets a new string. A compiled step holds the positions of rows as constants,
        # and torch.compile always guards strings by value, so a new string forces a recompilation.
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
        """Add a group as :meth:`torch.optim.Optimizer.add_param_group` does.

        Args:
            param_group: ``"params"`` and options, as in torch.

        Raises:
            RuntimeError: a parameter is a tensor wrapper other than DTensor, or a DTensor that is a partial
                sum. The group is not added.
        """
        super().add_param_group(param_group)
        self._sharded |= any(map(is_sharded, self.param_groups[-1]["params"]))
        try:
            check_wrapped(type(self).__name__, len(self.param_groups) - 1, param_group)
        except RuntimeError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict as torch does.

        Masked rows of attached tables and their state are set to zero again afterwards.

        Args:
            state_dict: one of this class, or of the optimizer of the same name in ``torch.optim``.
        """
        super().load_state_dict(state_dict)
        for table in self._tables:
            self._zero_masked(table)

    @property
    def tables(self) -> tuple[RowTable, ...]:
        """The attached tables, in the order of their attachment."""
        return self._tables

    def attach(self, table: RowTable) -> Attachment:
        """Process ``table`` in every following step: statistics, penalty, fade-out, masks.

        Several tables with different parameters can be attached. Each native call takes parameters with
        rows of one table. Masked rows and their state are set to zero now. ``state_dict``, pickles and deep
        copies of the optimizer do not contain tables: a copy has none, and steps as ``torch.optim`` does.

        Args:
            table: rows of parameters of this optimizer; rows of other parameters stay as they are.

        Returns:
            A handle whose ``remove()`` detaches this table.

        Raises:
            RuntimeError: an attached table already has one of its parameters.
            ValueError: none of the table's parameters is in this optimizer.
        """
        check_table(self, table, self._tables)
        self._set_tables((*self._tables, table))
        self._zero_masked(table)
        return Attachment(self.attach, self._remove, table)

    def _remove(self, table: RowTable) -> None:
        """Remove one table; does nothing if it is not attached."""
        left = tuple(other for other in self._tables if other is not table)
        if len(left) < len(self._tables):
            self._set_tables(left)

    def detach(self) -> None:
        """Remove all tables; following steps equal those of ``torch.optim``."""
        self._set_tables(())

    def _set_tables(self, tables: tuple[RowTable, ...]) -> None:
        """Replace the attached tables and invalidate the cached lists."""
        self._tables = tables
        self._kept = None
        self._attachment = f"tables {next(_attachments)}" if tables else ""

    def _zero_masked(self, table: RowTable) -> None:
        """Set masked rows of the table and their optimizer state to zero."""
        table.zero_masked(state_tensors(self.state))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step all parameters that have a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The result of ``closure``; None without one.

        Raises:
            RuntimeError: a gradient is sparse or complex, a dtype is unsupported, or state does not fit its
                parameter. Nothing is changed.
        """
        if self._sharded:
            return self._step_uncompiled(closure)
        return self._step_all(closure)

    @_disable_dynamo
    def _step_uncompiled(self, closure: Callable[[], float] | None) -> float | None:
        # A trace would record the local parts of parameters and gradients as constants.
        return self._step_all(closure)

    def _step_all(self, closure: Callable[[], float] | None) -> float | None:
        if "capturable" in self.defaults:
            self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None:
            # GradScaler sums found_inf over devices; the kernels compare it with 1.
            found_inf = found_inf.clamp(max=1)
        scaling = UNSCALED
        if grad_scale is not None or found_inf is not None:
            scaling = Scaling(grad_scale, found_inf)
        for tensors, grads in self._lists():
            self._step_list(tensors, grads, scaling)
        for table in self._tables:
            channel_moments_(table)
        return loss

    def _step_list(self, tensors: TensorList, grads: list[Tensor], scaling: Scaling) -> None:
        """Step one list.

        Args:
            tensors: parameters and state.
            grads: their gradients, in the same order.
            scaling: what GradScaler hands to the step, on any device.
        """
        params, group = tensors.params, self.param_groups[tensors.group]
        device = params[0].device
        state = tensors.state
        if tensors.first:
            # The state starts as zeros, because the step never writes its masked rows.
            state = {name: [torch.zeros_like(p) for p in params] for name in self._state_names(group)}
            options = self._options.make(group, device, first=True)
        else:
            options = self._options.of(tensors.group, group, device)
        if tensors.first or not tensors.columns:
            tensors.columns = tuple([state.get(name, []) for name in self._STATE])
        if scaling is not UNSCALED:
            scaling = Scaling(
                *(value.to(device, non_blocking=True) if value is not None else None for value in scaling)
            )
        step_(self._OP, (params, grads, *tensors.columns), options, tensors.rows, scaling)
        # A skipped first step stores no state. With state, the next step would not be the first.
        if tensors.first and (scaling.found_inf is None or scaling.found_inf.item() != 1):
            for name, values in state.items():
                self._store(tensors, name, values)

    def step_parameter(self, index: int, param: Tensor) -> None:
        """Step one parameter that has a gradient; the caller must end the step with ``step()``.

        Args:
            index: index of its group in ``param_groups``.
            param: the parameter; its gradient is not changed.

        Raises:
            RuntimeError: the conditions of :meth:`step`.
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
        self._step_list(tensors, [local(param.grad)], UNSCALED)

    def _lists(self) -> list[tuple[TensorList, list[Tensor]]]:
        """All lists of one step, each with its gradients."""
        if torch.compiler.is_compiling():
            return self._traced_lists()
        groups, state = self.param_groups, self.state
        names = list(map(self._state_names, groups))
        kept = self._kept
        grads = None if kept is None else kept.grads(groups, names, state)
        if kept is None or grads is None:
            kept, grads = self._keep(names)
        if kept.sharded:
            grads = list(map(local, grads))
        return [(tensors, tensors.pick(grads)) for tensors in kept.lists]

    def _keep(self, names: list[tuple[str, ...]]) -> tuple[Kept, list[Tensor]]:
        """Build and cache new lists; return them and all gradients that exist."""
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
        """All lists of one step with their gradients, built inside a trace of torch.compile."""
        result = []
        for index, group in enumerate(self.param_groups):
            parts, grads = self._lists_of(index, group, 0)
            result += [(tensors, tensors.pick(grads)) for tensors in parts]
        return result

    def _lists_of(
        self, index: int, group: dict[str, Any], offset: int
    ) -> tuple[list[TensorList], list[Tensor]]:
        """The lists of one group, and all its gradients; ``offset`` is the position of the first gradient."""
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
        """Append the group's parameters that have a gradient to the lists, and create missing state.

        torch.compile recognises this method by its name: it runs the method in Python and maps the lists
        back into its trace. Code that cannot be traced (object identities, checks) therefore belongs here.

        Args:
            group: one of ``param_groups``.
            params: filled with the parameters (local parts of sharded ones).
            grads: filled with their gradients (local parts of sharded ones).
            buckets: filled with the index of each parameter's :class:`TensorList`.
            numbers: filled with the index of each parameter's table; 0 where no table has its rows.
            starts: filled with the first row of each parameter, as in ``Rows``; -1 without rows.
            dims: filled with the row dimension of each parameter, as in ``Rows``; 0 without rows.
            columns: one list per name of :meth:`_state_names`, filled with the state; None where the step
                creates it.
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
            # A group may hold a parameter twice. As in torch it is stepped twice, here in two calls.
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
        """The index of the table that has rows of ``param``, and its rows; 0 and None without a table."""
        for number, table in enumerate(self._tables):
            if (view := table.index.get(id(param))) is not None:
                return number, view
        return 0, None

    def _store(self, tensors: TensorList, name: str, values: Sequence[Tensor]) -> None:
        """Store ``values``, created by a step, as the state ``name`` of the list's parameters."""
        for param, value in zip(tensors.owners or tensors.params, values, strict=True):
            self.state[param][name] = wrapped_like(value, param)

    def _state_of(self, param: Tensor, name: str) -> Tensor | None:
        """The state ``name`` of ``param``: created if missing, else fitted to the parameter; then stored."""
        state = self.state[param]
        value = state.get(name)
        value = self._new_state(name, param) if value is None else fit_state(name, value, param)
        if value is not None:
            state[name] = value
        return value

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Keys of ``state[p]`` that a step of the group uses; torch's names."""
        raise NotImplementedError

    def _new_state(self, name: str, param: Tensor) -> Tensor | None:
        """The state of a parameter before its first step; None if that step creates it."""
        raise NotImplementedError
