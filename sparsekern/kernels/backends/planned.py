"""Steps by plans: the part of a step that all backends with compiled kernels share.

A plan is made once per list of parameters. It stores what the kernels need to know of their shapes, and what
the tensors of a call have to be. Each call compares its tensors with the plan, so an outdated plan costs time
and never gives a wrong result.

Some tensors do not suit the kernels: views with gaps, tensors without elements, tensors of another dtype. The
reference backend processes these. A tensor whose memory order differs from its parameter's is copied into
that order for the call.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsekern.kernels import checks
from sparsekern.kernels import native as _native
from sparsekern.kernels.backends import reference
from sparsekern.kernels.backends.lists import MemoryShape, memory_shape, memory_shapes
from sparsekern.kernels.options import STEPS, UNSCALED, Lists, Options, Scaling, named, read_lists
from sparsekern.kernels.rows import Rows

_PLANNED_TENSORS_LIMIT = 1 << 14
_BYTES_A_TENSOR = 8


def _identities_in_python(objects: Sequence[object]) -> bytes:
    return array("Q", map(id, objects)).tobytes()


_module = _native.load()
_identities: Callable[[Sequence[object]], bytes] = (
    _identities_in_python if _module is None else _module.identities
)


@dataclass(slots=True, kw_only=True)
class Plan:
    """What one list of parameters needs for a native call. Each backend extends it.

    Attributes:
        starts: first row of each tensor, -1 for an untracked one; None when no tensor is tracked.
        dims: row dimension of each tensor; None when no tensor is tracked.
    """

    starts: list[int] | None = None
    dims: list[int] | None = None

    def is_for(self, rows: Rows | None) -> bool:
        """Whether the plan was made for these rows."""
        if rows is None or rows.table is None:
            return self.starts is None
        return rows.starts == self.starts and rows.dims == self.dims

    def run(self, op: int, lists: Lists, options: Options, rows: Rows | None, scaling: Scaling) -> bool:
        """Make the native call for one list; the arguments are those of ``reference.step_``.

        Returns:
            False, with nothing changed, when a tensor does not match the plan.

        Raises:
            RuntimeError: the kernels refused the list.
        """
        raise NotImplementedError


@dataclass(eq=False)
class PlannedSteps:
    """The function ``step_`` of a backend, with its cache of plans.

    Attributes:
        takes_kind: whether the kernels take the device and dtype of a tensor.
        make_plan: makes a plan for parameters and their shapes in memory; None when the kernels cannot take
            them. The plan need not know its rows.
        plans: the plans, keyed by the identities of the parameters. They hold no tensors of the caller.
    """

    takes_kind: Callable[[Tensor], bool]
    make_plan: Callable[[Sequence[Tensor], list[MemoryShape]], Plan | None]
    plans: dict[bytes, Any] = field(default_factory=dict)

    def step_(
        self, op: int, lists: Lists, options: Options, rows: Rows | None, scaling: Scaling = UNSCALED
    ) -> None:
        """Run an op over a list: in one native call where possible, else in parts.

        The arguments are those of :func:`sparsekern.kernels.backends.reference.step.step_`.

        Raises:
            TypeError, ValueError: an argument does not fit; nothing has changed then.
            RuntimeError: the kernels refused the list.
        """
        if not lists[0]:
            return
        plan = self._kept_plan(lists[0], rows)
        if plan is not None and plan.run(op, lists, options, rows, scaling):
            return
        if not self._run_new_plan(op, lists, options, rows, scaling):
            self._step_in_parts(op, lists, options, rows, scaling)

    def _kept_plan(self, params: Sequence[Tensor], rows: Rows | None) -> Plan | None:
        """The plan that was made for ``params`` with these rows; None without one."""
        plan: Plan | None = self.plans.get(_identities(params))
        return plan if plan is not None and plan.is_for(rows) else None

    def _run_new_plan(
        self, op: int, lists: Lists, options: Options, rows: Rows | None, scaling: Scaling
    ) -> bool:
        """Make a plan, run it and keep it. Returns False, with nothing changed, when that is not possible."""
        params = lists[0]
        checks.inside(rows, params)
        plan = self._plan(params, rows)
        if plan is None or not plan.run(op, lists, options, rows, scaling):
            return False
        key = _identities(params)
        # A step in the backward pass has one list, and so one plan, per tensor.
        if sum(map(len, self.plans)) + len(key) > _PLANNED_TENSORS_LIMIT * _BYTES_A_TENSOR:
            self.plans.clear()
        self.plans[key] = plan
        return True

    def _run(self, op: int, lists: Lists, options: Options, rows: Rows | None, scaling: Scaling) -> bool:
        """Run the kept plan or a new one. Returns False, with nothing changed, when that is not possible."""
        plan = self._kept_plan(lists[0], rows)
        if plan is not None and plan.run(op, lists, options, rows, scaling):
            return True
        return self._run_new_plan(op, lists, options, rows, scaling)

    def _plan(self, params: Sequence[Tensor], rows: Rows | None) -> Plan | None:
        """A plan for all of ``params``; None when the kernels cannot process one of them."""
        starts, dims = None, None
        if rows is not None and rows.table is not None:
            starts, dims = list(rows.starts), list(rows.dims)
        shapes = memory_shapes(params, starts, dims, self.takes_kind)
        plan = None if shapes is None else self.make_plan(params, shapes)
        if plan is not None:
            plan.starts, plan.dims = starts, dims
        return plan

    def _step_in_parts(
        self, op: int, lists: Lists, options: Options, rows: Rows | None, scaling: Scaling
    ) -> None:
        """Process a list that one call cannot process: one call for what suits the kernels, then the rest.

        Raises:
            TypeError, ValueError: an argument does not fit; nothing has changed then.
        """
        params = lists[0]
        scaled = scaling.grad_scale is not None
        checks.tensors(named(op, lists), rows, read_lists(op, scaled))
        regular = [
            i for i, p in enumerate(params) if self.takes_kind(p) and memory_shape(p, -1, 0) is not None
        ]
        rest = sorted(set(range(len(params))) - set(regular))
        part = _part(lists, regular)
        with torch.no_grad():
            ordered = _in_order_of_params(part)
            if regular and self._run(op, ordered, options, _part_of_rows(rows, regular), scaling):
                _copy_back(part, ordered, written=range(1 if scaled else 2, len(part)))
            else:
                rest = list(range(len(params)))
            if rest:
                reference.step_(op, _part(lists, rest), options, _part_of_rows(rows, rest), scaling)


def _part(lists: Lists, indices: list[int]) -> Lists:
    return tuple([tensors[i] for i in indices] if tensors else [] for tensors in lists)


def _part_of_rows(rows: Rows | None, indices: list[int]) -> Rows | None:
    if rows is None or rows.table is None:
        return None
    return Rows(rows.table, [rows.starts[i] for i in indices], [rows.dims[i] for i in indices])


def _in_order_of_params(lists: Lists) -> Lists:
    """The lists, with each tensor in the memory order of its parameter.

    A tensor in another order is replaced by a copy. The caller keeps the copies alive until the native call
    returns, because the kernels hold addresses only.
    """
    params = lists[0]
    ordered = [params]
    for position, tensors in enumerate(lists[1:], 1):
        if position == STEPS:
            ordered.append(tensors)
            continue
        ordered.append(
            [
                tensor
                if tensor.stride() == param.stride() and not tensor.is_neg()
                else torch.empty_like(param, memory_format=torch.preserve_format).copy_(tensor)
                for tensor, param in zip(tensors, params, strict=False)
            ]
        )
    return tuple(ordered)


def _copy_back(part: Lists, ordered: Lists, written: range) -> None:
    """Copy the written copies of :func:`_in_order_of_params` back to the original tensors."""
    for position in written:
        for tensor, copy in zip(part[position], ordered[position], strict=True):
            if copy is not tensor:
                tensor.copy_(copy)
