"""Native kernels for tensors on the CPU: one call per list, with the same results as the reference.

A plan is made once per list. It stores the memory shape of each tensor and the chunks for the threads. Each
call reads the addresses again and compares dtype, sizes and strides of every tensor with the plan, in native
code. A list that does not match is checked in Python and planned again, in parts if necessary
(:mod:`~sparsekern.kernels.backends.lists`). The reference processes float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sparsekern.kernels import checks as _checks
from sparsekern.kernels import native as _native
from sparsekern.kernels.backends import reference
from sparsekern.kernels.backends.cpu.norm_act import norm_act_backward as norm_act_backward
from sparsekern.kernels.backends.cpu.norm_act import norm_act_forward as norm_act_forward
from sparsekern.kernels.backends.lists import (
    ADAM,
    MASK,
    SGD,
    STATISTICS,
    STEPS,
    Lists,
    Plans,
    channel_arrays,
    memory_shapes,
    row_arrays,
    run_in_parts,
    where_rows_are,
)
from sparsekern.kernels.native import pointers
from sparsekern.kernels.rows import ChannelArrays, RowArrays, Rows, RowTable

_CPU = torch.device("cpu")

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}

_MISFIT = -1

_plans = Plans()


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
    """See :func:`sparsekern.kernels.backends.reference.sgd_step_`."""
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
    _step(SGD, reference.sgd_step_, (params, grads, momentum_buffers), options, rows)


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
    """See :func:`sparsekern.kernels.backends.reference.adam_step_`."""
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
    _step(ADAM, reference.adam_step_, lists, options, rows)


def row_statistics_(params: Sequence[Tensor], grads: Sequence[Tensor], *, rows: Rows) -> None:
    """See :func:`sparsekern.kernels.backends.reference.row_statistics_`."""
    _step(STATISTICS, reference.row_statistics_, (params, grads), {}, rows)


def row_mask_(params: Sequence[Tensor], *, lr: float | Tensor, rows: Rows) -> None:
    """See :func:`sparsekern.kernels.backends.reference.row_mask_`."""
    _step(MASK, reference.row_mask_, (params,), {"lr": float(lr)}, rows)


def channel_moments_(table: RowTable | ChannelArrays) -> None:
    """See :func:`sparsekern.kernels.backends.reference.channel_moments_`."""
    if not _C.step_channels(channel_arrays(table), table.decay):
        _checks.channels(table)
        reference.channel_moments_(table)


@dataclass(slots=True)
class _Plan:
    """A native plan and the tensors that it fits.

    Attributes:
        native: the plan of the native module.
        starts: first row of each tensor, -1 for an untracked one; None when no tensor is tracked.
        dims: row dimension of each tensor; None when no tensor is tracked.
        layouts: sizes and strides of each tensor.
        dtype: dtype of all tensors.
    """

    native: Any
    starts: list[int] | None
    dims: list[int] | None
    layouts: list[pointers.Layout]
    dtype: torch.dtype


def _step(op: int, fallback: Any, lists: Lists, options: dict[str, Any], rows: Rows | None) -> None:
    """Run an op over a list: in one native call where possible, else in parts."""
    if not lists[0]:
        return

    def run(lists: Lists, rows: Rows | None) -> bool:
        return _run(op, lists, options, rows)

    if not run(lists, rows):
        run_in_parts(op, run, _takes_kind, fallback, lists, options, rows)


def _run(op: int, lists: Lists, options: dict[str, Any], rows: Rows | None) -> bool:
    """Make one native call. Returns False, and changes nothing, when a tensor does not suit the kernels."""
    params = lists[0]
    return _plans.run(
        params,
        rows,
        lambda: _make_plan(params, rows),
        lambda plan: _call(plan, op, lists, options, rows),
    )


def _call(plan: _Plan, op: int, lists: Lists, options: dict[str, Any], rows: Rows | None) -> bool:
    """Run ``plan``. Returns False, and writes no data, when a tensor does not match the plan.

    Raises:
        RuntimeError: the kernels refused the list.
    """
    table = None if rows is None else rows.table
    arrays = () if table is None else row_arrays(table)
    hyper = _hyper(op, options, table)
    update_statistics = options.get("lr") != 0
    threads = torch.get_num_threads()
    if op != STATISTICS:
        # Autograd does not see raw writes, so the version is raised here. It is raised before the call,
        # while the metadata of the tensors is in the caches. If the call is then not made, the version
        # rises once more than necessary.
        increment_version(lists[0])
    if _native.exchanges:
        code = _C.step(plan.native, op, lists, arrays, hyper, update_statistics, threads)
    else:
        addresses = pointers.addresses_of_lists(lists, plan.layouts, plan.dtype, STEPS, _CPU)
        flat = pointers.addresses_of_arrays(arrays, _CPU)
        if addresses is None or flat is None:
            return False
        code = _C.step_at(plan.native, op, addresses, flat, hyper, update_statistics, threads)
    if code == _MISFIT:
        return False
    if code != 0:
        raise RuntimeError(f"the native kernels refused a list of {len(lists[0])} tensors (error {code})")
    return True


def _hyper(op: int, options: dict[str, Any], table: RowTable | RowArrays | None) -> tuple[float, ...]:
    """The hyperparameters of a call, in the order of ``Hyper`` in csrc/abi.h."""
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
        op == MASK or get("decoupled", False),
        get("amsgrad", False),
        get("maximize", False),
        scale is not None,
    )


def _takes_kind(param: Tensor) -> bool:
    """Whether the kernels take the device and dtype of ``param``; `memory_shape` checks the strides."""
    return param.device.type == "cpu" and param.dtype in _DTYPES


def _make_plan(params: Sequence[Tensor], rows: Rows | None) -> _Plan | None:
    """A plan for all of ``params``; None when the kernels cannot process one of them."""
    _checks.inside(rows, params)
    starts, dims = where_rows_are(rows)
    shapes = memory_shapes(params, starts, dims, _takes_kind)
    if shapes is None:
        return None
    dtype = params[0].dtype
    layouts = [pointers.layout(param) for param in params]
    return _Plan(_C.plan(_DTYPES[dtype], layouts, shapes), starts, dims, layouts, dtype)


_C: Any = _native.load()
