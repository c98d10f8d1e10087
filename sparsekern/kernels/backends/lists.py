"""Lists of tensors for the compiled backends: memory shapes, cached plans, and calls in parts.

Some tensors do not suit the kernels: views with gaps, tensors without elements, tensors of another dtype. The
reference backend processes these. A tensor whose memory order differs from its parameter's is copied into
that order for the call.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsekern.kernels import checks
from sparsekern.kernels import native as _native
from sparsekern.kernels.rows import ChannelArrays, RowArrays, Rows, RowTable

Lists = tuple[Sequence[Tensor], ...]

SGD, ADAM, STATISTICS, MASK = range(4)
"""Numbers of the ops, as in csrc/abi.h."""

STEPS = 5
"""Position of the step counters among the lists of Adam."""

_STATES = {
    SGD: ("momentum_buffers",),
    ADAM: ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps"),
    STATISTICS: (),
    MASK: (),
}

_PLANNED_TENSORS_LIMIT = 1 << 14


def _identities_in_python(objects: Sequence[object]) -> bytes:
    return array("Q", map(id, objects)).tobytes()


_module = _native.load()
_identities: Callable[[Sequence[object]], bytes] = (
    _identities_in_python if _module is None else _module.identities
)
_BYTES_A_TENSOR = 8


class ForRows(Protocol):
    """A plan that stores which rows it was made for.

    Attributes:
        starts: first row of each tensor, -1 for an untracked one; None when no tensor is tracked.
        dims: row dimension of each tensor; None when no tensor is tracked.
    """

    starts: list[int] | None
    dims: list[int] | None


_Plan = TypeVar("_Plan", bound=ForRows)


@dataclass
class Plans:
    """A cache of plans, keyed by the identities of the parameters of a list.

    A plan holds no tensors of the caller. Each call compares the tensors with the plan, so an outdated plan
    costs time and never gives a wrong result.
    """

    by_params: dict[bytes, Any] = field(default_factory=dict)

    def run(
        self,
        params: Sequence[Tensor],
        rows: Rows | None,
        make: Callable[[], _Plan | None],
        call: Callable[[_Plan], bool],
    ) -> bool:
        """Call ``call`` with the plan of ``params``. A missing or outdated plan is made first.

        Args:
            params: the parameters of the list.
            rows: the rows of ``params``.
            make: makes a plan; returns None when the kernels cannot process one of the tensors.
            call: runs a plan; returns False, and changes nothing, when a tensor does not match the plan.

        Returns:
            Whether the call was made.
        """
        key = _identities(params)
        plan = self.by_params.get(key)
        if plan is not None and _is_for(plan, rows) and call(plan):
            return True
        plan = make()
        if plan is None or not call(plan):
            return False
        # A step in the backward pass has one list, and so one plan, per tensor.
        if sum(map(len, self.by_params)) + len(key) > _PLANNED_TENSORS_LIMIT * _BYTES_A_TENSOR:
            self.by_params.clear()
        self.by_params[key] = plan
        return True


def _is_for(plan: ForRows, rows: Rows | None) -> bool:
    """Whether ``plan`` was made for these rows."""
    if rows is None or rows.table is None:
        return plan.starts is None
    return rows.starts == plan.starts and rows.dims == plan.dims


def where_rows_are(rows: Rows | None) -> tuple[list[int] | None, list[int] | None]:
    """Copies of ``rows.starts`` and ``rows.dims``; ``(None, None)`` when no tensor is tracked."""
    if rows is None or rows.table is None:
        return None, None
    return list(rows.starts), list(rows.dims)


def row_arrays(table: RowTable | RowArrays) -> tuple[Tensor, ...]:
    """The flat arrays in the order of ``RowArrays`` in csrc/abi.h."""
    return (
        table.penalty,
        table.elements,
        table.countdown,
        table.sums,
        table.threshold,
        table.activity,
        table.nonfinite,
        table.pending,
    )


def channel_arrays(table: RowTable | ChannelArrays) -> tuple[Tensor, ...]:
    """The arrays of ``channel_moments_``, in the order of the native structs."""
    return (
        table.gate_offsets,
        table.gate_rows,
        table.sums,
        table.channel_dot,
        table.channel_dot_sq,
        table.updates,
        table.pending,
    )


def memory_shapes(
    params: Sequence[Tensor],
    starts: list[int] | None,
    dims: list[int] | None,
    takes_kind: Callable[[Tensor], bool],
) -> list[tuple[int, int, int, int]] | None:
    """Memory shapes of all tensors of a list.

    Args:
        params: the tensors.
        starts: first row of each tensor, -1 for an untracked one; None when no tensor is tracked.
        dims: row dimension of each tensor; None when no tensor is tracked.
        takes_kind: whether the backend takes tensors of this device and dtype.

    Returns:
        ``(outer, rows, inner, start)`` of each tensor, see :func:`memory_shape`; None when the kernels
        cannot process one of the tensors.
    """
    shapes = []
    for i, param in enumerate(params):
        shape = memory_shape(param, starts[i] if starts else -1, dims[i] if dims else 0)
        if shape is None or not takes_kind(param):
            return None
        shapes.append(shape)
    return shapes


def memory_shape(param: Tensor, start: int, dim: int) -> tuple[int, int, int, int] | None:
    """Shape of a tensor in the order of its memory.

    Args:
        param: the tensor.
        start: its first row in the flat arrays; -1 when it is not tracked.
        dim: its row dimension.

    Returns:
        ``(outer, rows, inner, start)``: element ``(o, r, i)`` is at ``(o * rows + r) * inner + i``. An
        untracked tensor is one row. None when the tensor has gaps or no elements, or is not plain and dense.
    """
    is_plain = type(param) in (Parameter, Tensor) and param.layout is torch.strided and not param.is_neg()
    if not is_plain or param.numel() == 0:
        return None
    order = sorted((d for d in range(param.dim()) if param.shape[d] != 1), key=lambda d: -param.stride()[d])
    span = 1
    for d in reversed(order):
        if param.stride(d) != span:
            return None
        span *= param.shape[d]
    if start < 0:
        return 1, 1, param.numel(), -1
    if param.shape[dim] == 1:
        return 1, 1, param.numel(), start
    at = order.index(dim)
    outer = math.prod(param.shape[d] for d in order[:at])
    return outer, param.shape[dim], math.prod(param.shape[d] for d in order[at + 1 :]), start


def run_in_parts(
    op: int,
    run: Callable[[Lists, Rows | None], bool],
    takes_kind: Callable[[Tensor], bool],
    fallback: Any,
    lists: Lists,
    options: dict[str, Any],
    rows: Rows | None,
) -> None:
    """Process a list that one native call cannot process.

    ``run`` processes the tensors that suit the kernels, ``fallback`` the rest.

    Args:
        op: number of the op.
        run: makes a native call; returns False, and changes nothing, when it cannot.
        takes_kind: whether the backend takes tensors of this device and dtype.
        fallback: the function of the reference backend.
        lists: the lists of tensors of the op.
        options: the keyword arguments of ``fallback``.
        rows: the rows of the parameters.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has changed then.
    """
    params = lists[0]
    scaled = options.get("grad_scale") is not None
    checks.tensors(named(op, lists), rows, read_lists(op, scaled))
    regular = [i for i, p in enumerate(params) if takes_kind(p) and memory_shape(p, -1, 0) is not None]
    rest = sorted(set(range(len(params))) - set(regular))
    part = _part(lists, regular)
    with torch.no_grad():
        ordered = _in_order_of_params(part)
        if regular and run(ordered, _part_of_rows(rows, regular)):
            written = range(1 if scaled else 2, len(part))
            for position in written:
                for tensor, copy in zip(part[position], ordered[position], strict=True):
                    if copy is not tensor:
                        tensor.copy_(copy)
        else:
            rest = list(range(len(params)))
        if rest:
            fallback(*_part(lists, rest), **options, rows=_part_of_rows(rows, rest))


def named(op: int, lists: Lists) -> dict[str, Sequence[Tensor]]:
    """The lists of an op, keyed by the names of its arguments."""
    return dict(zip(("params", "grads", *_STATES[op]), lists, strict=False))


def read_lists(op: int, scaled: bool) -> tuple[str, ...]:
    """Names of the lists that an op only reads. With a gradient scale the gradients are written."""
    if op == STATISTICS:
        return ("params", "grads")
    return () if scaled or op == MASK else ("grads",)


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
