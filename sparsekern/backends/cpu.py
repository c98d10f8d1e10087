"""Native kernels for tensors on the CPU: one call per list, equal to the reference.

A list is planned once: how each tensor lies in memory, and the chunks that it is cut into. Every
call reads the addresses anew and compares type, sizes and strides of every tensor with the plan, in
native code; what does not fit is checked in Python and planned again. Tensors that the kernels
cannot walk as they lie (views with holes, no elements, float16) go to the reference, and those in
another memory order than their parameter are copied into its order for the call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from sparsekern import _checks, _native, _pointers
from sparsekern._rows import ChannelArrays, RowArrays, Rows, RowTable
from sparsekern.backends import reference

Lists = tuple[Sequence[Tensor], ...]

_SGD, _ADAM, _STATISTICS, _MASK = range(4)
_STEPS = 5  # where the step counters are among the lists of Adam

_STATES = {
    _SGD: ("momentum_buffers",),
    _ADAM: ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"),
    _STATISTICS: (),
    _MASK: (),
}

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}

_MISFIT = -1

# By identities of the parameters. A plan holds no tensors and is compared at every call, so a wrong or
# outdated one costs time and nothing else.
_plans: dict[tuple[int, ...], _Plan] = {}
_PLANNED_TENSORS_LIMIT = 1 << 14


def sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    rows: Rows | None,
) -> None:
    """See :func:`sparsekern.backends.reference.sgd_step_`."""
    if found_inf is not None and float(found_inf) == 1:
        return
    options = {
        "lr": float(lr),
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
        "first": first,
        "grad_scale": grad_scale,
        "found_inf": None,
    }
    _step(_SGD, reference.sgd_step_, (params, grads, momentum_buffers), options, rows)


def adam_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    rows: Rows | None,
) -> None:
    """See :func:`sparsekern.backends.reference.adam_step_`."""
    if found_inf is not None and float(found_inf) == 1:
        return
    options = {
        "lr": float(lr),
        "beta1": beta1,
        "beta2": beta2,
        "eps": eps,
        "weight_decay": weight_decay,
        "decoupled": decoupled,
        "amsgrad": amsgrad,
        "maximize": maximize,
        "grad_scale": grad_scale,
        "found_inf": None,
    }
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
    _step(_ADAM, reference.adam_step_, lists, options, rows)


def row_statistics_(params: Sequence[Tensor], grads: Sequence[Tensor], *, rows: Rows) -> None:
    """See :func:`sparsekern.backends.reference.row_statistics_`."""
    _step(_STATISTICS, reference.row_statistics_, (params, grads), {}, rows)


def row_mask_(params: Sequence[Tensor], *, lr: float | Tensor, rows: Rows) -> None:
    """See :func:`sparsekern.backends.reference.row_mask_`."""
    _step(_MASK, reference.row_mask_, (params,), {"lr": float(lr)}, rows)


def channel_moments_(table: RowTable | ChannelArrays) -> None:
    """See :func:`sparsekern.backends.reference.channel_moments_`."""
    arrays = (
        table.gate_offsets,
        table.gate_rows,
        table.sums,
        table.channel_dot,
        table.channel_dot_sq,
        table.updates,
        table.pending,
    )
    sizes = (table.channel_dot.numel(), table.gate_rows.numel(), table.sums.shape[0])
    if not _C.step_channels(arrays, *sizes, table.decay):
        reference.channel_moments_(table)


@dataclass(slots=True)
class _Plan:
    """A native plan, and what else it was made for."""

    native: Any
    starts: list[int] | None
    dims: list[int] | None
    layouts: list[_pointers.Layout]
    dtype: torch.dtype

    def is_for(self, rows: Rows | None) -> bool:
        if rows is None or rows.table is None:
            return self.starts is None
        return rows.starts == self.starts and rows.dims == self.dims


def _step(op: int, fallback: Any, lists: Lists, options: dict[str, Any], rows: Rows | None) -> None:
    if not lists[0]:
        return
    if _run(op, lists, options, rows):
        return
    _in_parts(op, fallback, lists, options, rows)


def _run(op: int, lists: Lists, options: dict[str, Any], rows: Rows | None) -> bool:
    """One native call. False when a tensor is such that it cannot be made; nothing has changed then."""
    params = lists[0]
    key = tuple(map(id, params))
    plan = _plans.get(key)
    if plan is not None and plan.is_for(rows) and _call(plan, op, lists, options, rows):
        return True
    plan = _make_plan(params, rows)
    if plan is None or not _call(plan, op, lists, options, rows):
        return False
    # In the backward pass every tensor is a list of its own, and has its own plan.
    if sum(map(len, _plans)) + len(key) > _PLANNED_TENSORS_LIMIT:
        _plans.clear()
    _plans[key] = plan
    return True


def _call(plan: _Plan, op: int, lists: Lists, options: dict[str, Any], rows: Rows | None) -> bool:
    table = None if rows is None else rows.table
    arrays = () if table is None else _arrays(table)
    hyper = _hyper(op, options, table)
    learn = options.get("lr") != 0
    threads = torch.get_num_threads()
    if _native.exchanges:
        code = _C.step(plan.native, op, lists, arrays, hyper, learn, threads)
    else:
        addresses = _pointers.of_lists(lists, plan.layouts, plan.dtype, _STEPS)
        flat = _pointers.of_arrays(arrays)
        if addresses is None or flat is None:
            return False
        code = _C.step_at(plan.native, op, addresses, flat, hyper, learn, threads)
    if code == _MISFIT:
        return False
    if code != 0:
        raise RuntimeError(f"the native kernels refused a list of {len(lists[0])} tensors (error {code})")
    if op != _STATISTICS:
        # Raw writes do not tell autograd that a saved tensor has changed.
        increment_version(lists[0])
    return True


def _arrays(table: RowTable | RowArrays) -> tuple[Tensor, ...]:
    return (
        table.penalty,
        table.countdown,
        table.sums,
        table.threshold,
        table.activity,
        table.nonfinite,
        table.pending,
    )


def _hyper(op: int, options: dict[str, Any], table: RowTable | RowArrays | None) -> tuple[float, ...]:
    """The numbers of a call in the order of ``Hyper`` in csrc/abi.h."""
    get = options.get
    scale = get("grad_scale")
    return (
        get("lr", 0.0),
        get("weight_decay", 0.0),
        get("momentum", 0.0),
        get("dampening", 0.0),
        get("beta1", 0.0),
        get("beta2", 0.0),
        get("eps", 0.0),
        1.0 if scale is None else float(scale),
        1.0 if table is None else table.tau,
        0.0 if table is None else table.decay,
        get("nesterov", False),
        get("first", False),
        op == _MASK or get("decoupled", False),
        get("amsgrad", False),
        get("maximize", False),
        scale is not None,
    )


def _make_plan(params: Sequence[Tensor], rows: Rows | None) -> _Plan | None:
    """A plan for all of ``params``; None when the kernels cannot walk one of them."""
    _checks.inside(rows, params)
    starts, dims = None, None
    if rows is not None and rows.table is not None:
        starts, dims = list(rows.starts), list(rows.dims)
    shapes = []
    for i, param in enumerate(params):
        shape = _memory_shape(param, starts[i] if starts else -1, dims[i] if dims else 0)
        if shape is None:
            return None
        shapes.append(shape)
    dtype = params[0].dtype
    layouts = [_pointers.layout(param) for param in params]
    return _Plan(_C.plan(_DTYPES[dtype], layouts, shapes), starts, dims, layouts, dtype)


def _memory_shape(param: Tensor, start: int, dim: int) -> tuple[int, int, int, int] | None:
    """``(outer, rows, inner, start)`` of a tensor as it lies; None when the kernels cannot walk it."""
    plain = type(param) in (Parameter, Tensor) and param.device.type == "cpu"
    if not plain or param.dtype not in _DTYPES or param.numel() == 0:
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


def _in_parts(op: int, fallback: Any, lists: Lists, options: dict[str, Any], rows: Rows | None) -> None:
    """A list that no single native call takes: what it can take, and the rest by the reference."""
    params = lists[0]
    _check(op, lists)
    regular = [i for i, param in enumerate(params) if _memory_shape(param, -1, 0) is not None]
    rest = sorted(set(range(len(params))) - set(regular))
    part = _part(lists, regular)
    with torch.no_grad():
        ordered = _in_order_of_params(part)
        if regular and _run(op, ordered, options, _part_of_rows(rows, regular)):
            written = range(1 if options.get("grad_scale") is not None else 2, len(part))
            for position in written:
                for tensor, copy in zip(part[position], ordered[position], strict=True):
                    if copy is not tensor:
                        tensor.copy_(copy)
        else:
            rest = list(range(len(params)))
        if rest:
            fallback(*_part(lists, rest), **options, rows=_part_of_rows(rows, rest))


def _check(op: int, lists: Lists) -> None:
    params = lists[0]
    _checks.parameters(params)
    for name, tensors in zip(("grads", *_STATES[op]), lists[1:], strict=False):
        if tensors:
            _checks.like(name, tensors, params)
    if op == _ADAM:
        _checks.counters(lists[_STEPS], len(params))


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
        if position == _STEPS:
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


_C: Any = _native.load()
