"""What the compiled backends share: how a tensor lies in memory, and lists that no single call takes.

Tensors that the kernels cannot walk as they lie (views with holes, no elements, a dtype they lack) go to
the reference, and those in another memory order than their parameter are copied into its order for the
call.
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
"""The ops, as in csrc/abi.h."""

STEPS = 5
"""Where the step counters are among the lists of Adam."""

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
    """A plan: it knows which rows it was made for."""

    starts: list[int] | None
    dims: list[int] | None


_Plan = TypeVar("_Plan", bound=ForRows)


@dataclass
class Plans:
    """Plans of lists, by the identities of their parameters.

    A plan holds no tensors of the caller and is compared at every call, so a wrong or outdated one costs time
    and nothing else.
    """

    by_params: dict[bytes, Any] = field(default_factory=dict)

    def run(
        self,
        params: Sequence[Tensor],
        rows: Rows | None,
        make: Callable[[], _Plan | None],
        call: Callable[[_Plan], bool],
    ) -> bool:
        """``call`` with the plan of ``params``, made if there is none or it does not fit.

        Args:
            make: a plan; None when the kernels cannot walk one of the tensors.
            call: False when a tensor is not what the plan was made for; nothing has changed then.

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
        # In the backward pass every tensor is a list of its own, and has its own plan.
        if sum(map(len, self.by_params)) + len(key) > _PLANNED_TENSORS_LIMIT * _BYTES_A_TENSOR:
            self.by_params.clear()
        self.by_params[key] = plan
        return True


def _is_for(plan: ForRows, rows: Rows | None) -> bool:
    if rows is None or rows.table is None:
        return plan.starts is None
    return rows.starts == plan.starts and rows.dims == plan.dims


def where_rows_are(rows: Rows | None) -> tuple[list[int] | None, list[int] | None]:
    """Copies of the starts and dimensions of tracked lists."""
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
    """What ``channel_moments_`` works on, in the order of the native structs."""
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
    walkable: Callable[[Tensor], bool],
) -> list[tuple[int, int, int, int]] | None:
    """``(outer, rows, inner, start)`` of every tensor; None when one of them is not walkable."""
    shapes = []
    for i, param in enumerate(params):
        shape = memory_shape(param, starts[i] if starts else -1, dims[i] if dims else 0)
        if shape is None or not walkable(param):
            return None
        shapes.append(shape)
    return shapes


def memory_shape(param: Tensor, start: int, dim: int) -> tuple[int, int, int, int] | None:
    """``(outer, rows, inner, start)`` of a tensor as it lies; None when it has holes or no elements."""
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


def in_parts(
    op: int,
    run: Callable[[Lists, Rows | None], bool],
    walkable: Callable[[Tensor], bool],
    fallback: Any,
    lists: Lists,
    options: dict[str, Any],
    rows: Rows | None,
) -> None:
    """A list that no single native call takes: what ``run`` can take, and the rest by ``fallback``."""
    params = lists[0]
    scaled = options.get("grad_scale") is not None
    checks.tensors(named(op, lists), rows, read_lists(op, scaled))
    regular = [i for i, p in enumerate(params) if walkable(p) and memory_shape(p, -1, 0) is not None]
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
    """The lists of an op by the names of its arguments."""
    return dict(zip(("params", "grads", *_STATES[op]), lists, strict=False))


def read_lists(op: int, scaled: bool) -> tuple[str, ...]:
    """Names of the lists that an op does not write to; under a scale gradients are written."""
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
    """The lists with copies in place of tensors whose memory order is not their parameter's.

    They live until the caller has done with them: the kernels know addresses only.
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
