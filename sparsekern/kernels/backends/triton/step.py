"""Optimizer steps in Triton: two launches per list, equal to the reference.

This backend is the counterpart of :mod:`sparsekern.kernels.backends.cuda` for GPUs without the compiled CUDA
library. It is tested in Triton's interpreter and has never run on a GPU. A table on the device describes each
list to the kernels. The table is sent again only when its content changes: the address of a gradient, or a
number that is not a tensor, such as a learning rate. A training loop with constant addresses and numbers
sends nothing. Each captured graph has its own table.

With ``TRITON_INTERPRET=1``, set before triton is imported, the backend takes tensors on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from torch.autograd.graph import increment_version

from sparsekern.kernels.backends import reference
from sparsekern.kernels.backends.lists import (
    ADAM,
    MASK,
    SGD,
    STATISTICS,
    Lists,
    Plans,
    row_arrays,
    run_in_parts,
)
from sparsekern.kernels.backends.triton import finish_kernels, step_kernels
from sparsekern.kernels.backends.triton.launch import DEVICE_TYPE, OPTIONS, STORAGE, compute_type, device_of
from sparsekern.kernels.backends.triton.plan import Plan, make_plan, takes_kind
from sparsekern.kernels.backends.triton.table import NUMBERS
from sparsekern.kernels.backends.triton.table import OPTIONS as FLAGS
from sparsekern.kernels.native import cuda_library
from sparsekern.kernels.rows import DOT, ChannelArrays, RowArrays, Rows, RowTable

_plans = Plans()

# Warps per program. With 4 warps the float64 kernels spill registers.
WARPS = {dtype: 8 if dtype is torch.float64 else 4 for dtype in STORAGE}

# Rows per block of the `finish` kernel, and channels per program of `fold_channels`.
_FINISHED, _FOLDED = 512, 256


def sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    rows: Rows | None,
    **options: Any,
) -> None:
    """See :func:`sparsekern.kernels.backends.reference.sgd_step_`."""
    _step(SGD, reference.sgd_step_, (params, grads, momentum_buffers), options, rows)


def adam_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    rows: Rows | None,
    **options: Any,
) -> None:
    """See :func:`sparsekern.kernels.backends.reference.adam_step_`."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
    _step(ADAM, reference.adam_step_, lists, options, rows)


def row_statistics_(params: Sequence[Tensor], grads: Sequence[Tensor], *, rows: Rows) -> None:
    """See :func:`sparsekern.kernels.backends.reference.row_statistics_`."""
    _step(STATISTICS, reference.row_statistics_, (params, grads), {}, rows)


def row_mask_(params: Sequence[Tensor], *, lr: float | Tensor, rows: Rows) -> None:
    """See :func:`sparsekern.kernels.backends.reference.row_mask_`."""
    _step(MASK, reference.row_mask_, (params,), {"lr": lr}, rows)


@torch.no_grad()
def channel_moments_(table: RowTable | ChannelArrays) -> None:
    """See :func:`sparsekern.kernels.backends.reference.channel_moments_`."""
    channels = table.channel_dot.numel()
    if channels:
        with device_of(table.sums):
            finish_kernels.fold_channels[(triton.cdiv(channels, _FOLDED),)](
                table.gate_offsets,
                table.gate_rows,
                table.sums,
                table.channel_dot,
                table.channel_dot_sq,
                table.pending,
                channels,
                table.decay,
                1 - table.decay,
                BLOCK=_FOLDED,
                **OPTIONS,
            )
    table.updates.add_(table.pending)
    table.sums[:, DOT] = 0
    table.pending.zero_()


def _step(op: int, fallback: Any, lists: Lists, options: dict[str, Any], rows: Rows | None) -> None:
    """Run one operation on a list, in parts or with the reference where the kernels do not support it."""
    if not lists[0]:
        return

    def run(lists: Lists, rows: Rows | None) -> bool:
        params = lists[0]
        return _plans.run(
            params,
            rows,
            lambda: make_plan(params, rows),
            lambda plan: _call(plan, op, lists, options, rows),
        )

    if not run(lists, rows):
        run_in_parts(op, run, takes_kind, fallback, lists, options, rows)


def _call(plan: Plan, op: int, lists: Lists, options: dict[str, Any], rows: Rows | None) -> bool:
    """Launch the kernels for one list; False if its tensors do not fit the plan."""
    table = None if rows is None else rows.table
    scaled = options.get("grad_scale") is not None
    addresses = plan.addresses.read(op, lists, () if table is None else row_arrays(table), scaled)
    if addresses is None:
        return False
    device, dtype = plan.addresses.device, plan.addresses.dtype
    tracks = table is not None and any(start >= 0 for start in plan.starts or ())
    lr, found_inf = _tensor(options.get("lr")), options.get("found_inf")
    compiled = {"OP": op, "FLAGS": _flags(op, options, tracks), **OPTIONS}
    with device_of(lists[0][0]):
        stream = cuda_library.stream(device) if DEVICE_TYPE == "cuda" else 0
        known = plan.table_on(stream, _numbers(options, table), addresses), plan.shapes
        step_kernels.step[(len(plan.owners),)](
            *known,
            plan.owners,
            lr,
            options.get("grad_scale"),
            found_inf,
            STORAGE=STORAGE[dtype],
            COMPUTE=compute_type(dtype),
            num_warps=WARPS[dtype],
            **compiled,
        )
        if tracks or op == ADAM:
            finish_kernels.finish[(len(lists[0]),)](*known, lr, found_inf, BLOCK=_FINISHED, **compiled)
    if op != STATISTICS:
        # Autograd does not see the kernels' writes. The version tells it that a saved tensor has changed.
        increment_version(lists[0])
    return True


def _tensor(value: float | Tensor | None) -> Tensor | None:
    """``value`` if it is a tensor, else None."""
    return value if isinstance(value, Tensor) else None


def _flags(op: int, options: dict[str, Any], tracks: bool) -> int:
    """The options that are compiled into the kernels, as bits in the order of ``table.OPTIONS``."""
    given = {
        "has_momentum": op == SGD and options["momentum"] != 0,
        "from_mean": op == ADAM and 1 - options["beta1"] < 0.5,
        "tracks": tracks,
    } | options
    return sum(1 << i for i, name in enumerate(FLAGS) if given.get(name))


def _numbers(options: dict[str, Any], table: RowTable | RowArrays | None) -> bytes:
    """The hyperparameters at the beginning of the table, float64 in the order of ``NUMBERS``."""
    # `row_statistics_` has no rate. With 0 the kernels would skip the rows.
    given = {"lr": 1.0, "tau": 1.0, "decay": 0.0} | options
    if table is not None:
        given |= {"tau": table.tau, "decay": table.decay}
    numbers = [given.get(name, 0.0) for name in NUMBERS]
    return np.array([0.0 if isinstance(value, Tensor) else value for value in numbers]).tobytes()
