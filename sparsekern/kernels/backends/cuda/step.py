"""Native kernels for tensors on NVIDIA GPUs: two launches per list, equal to the reference.

The first launch makes the step and takes the sums of the rows, the second folds them and updates what the
rows have per step. Everything about a list, addresses included, travels as arguments of the launches, so a
call allocates nothing after the first, waits for nothing, and may be captured in a CUDA graph: learning
rates, scales and ``found_inf`` that are tensors are read on the device, and so are penalties, countdowns
and masks.

Lists are planned and compared as on the CPU (:mod:`~sparsekern.kernels.backends.cpu`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sparsekern.kernels import checks
from sparsekern.kernels.backends import reference
from sparsekern.kernels.backends.addresses import Addresses
from sparsekern.kernels.backends.cuda.norm_act import norm_act_backward as norm_act_backward
from sparsekern.kernels.backends.cuda.norm_act import norm_act_forward as norm_act_forward
from sparsekern.kernels.backends.lists import (
    ADAM,
    MASK,
    SGD,
    STATISTICS,
    Lists,
    Plans,
    channel_arrays,
    in_parts,
    memory_shapes,
    row_arrays,
    where_rows_are,
)
from sparsekern.kernels.native import cuda_library, pointers
from sparsekern.kernels.rows import ChannelArrays, RowArrays, Rows, RowTable

_plans = Plans()

# Scratch that a captured graph writes to for as long as it is replayed, which nobody tells us.
_captured: list[Tensor] = []

# The counter of fold_moments by stream: two of them may run at once.
_tickets: dict[int, Tensor] = {}

_MOMENT_DTYPES = (torch.int64, torch.int64, *[torch.float32] * 5)

# What rows and their numbers have to be below in csrc/cuda/table.cuh.
_MOST_ROWS = 1 << 31


_target = cuda_library.Target(cuda_library.load(), "cuda", cuda_library.DEVICE_TYPE)


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


def channel_moments_(table: RowTable | ChannelArrays) -> None:
    """See :func:`sparsekern.kernels.backends.reference.channel_moments_`."""
    arrays = channel_arrays(table)
    device = table.sums.device
    channels, rows = table.channel_dot.numel(), table.sums.shape[0]
    fits = tuple(array.dtype for array in arrays) == _MOMENT_DTYPES
    found = pointers.of_arrays(arrays, device) if fits else None
    sizes = [channels + 1, table.gate_rows.numel(), 4 * rows, channels, channels, 1, 1]
    if found is None or [size for _, size in found] != sizes:
        reference.channel_moments_(table)
        return
    addresses = [address for address, _ in found]
    stream = cuda_library.stream(device)
    ticket = _tickets.get(stream)
    if ticket is None or ticket.device != device:
        ticket = _tickets[stream] = torch.zeros((), dtype=torch.int32, device=device)
    moments = cuda_library.Moments(
        *addresses, pointers.of_tensor(ticket), stream, channels, rows, table.decay, device.index or 0
    )
    cuda_library.check(_target.library, _target.library.sparsekern_cuda_moments(moments), "the channels")


@dataclass(slots=True)
class _Plan:
    """How a list is cut, what its tensors have to be, and where its partial sums go."""

    addresses: Addresses
    starts: list[int] | None
    dims: list[int] | None
    shapes: Any
    cuts: Any
    partials: int
    scratch: Tensor | None = None
    stream: int = -1
    captured: bool = False

    def scratch_on(self, stream: int) -> int | None:
        """Address of memory for the partial sums, which torch's allocator knows to be used on ``stream``."""
        if self.partials == 0:
            return None
        if self.scratch is None or self.stream != stream:
            self.scratch = torch.empty(self.partials * 4, dtype=torch.float32, device=self.addresses.device)
            self.stream, self.captured = stream, False
        if not self.captured and cuda_library.capturing():
            _captured.append(self.scratch)
            self.captured = True
        return pointers.of_tensor(self.scratch)


def _step(op: int, fallback: Any, lists: Lists, options: dict[str, Any], rows: Rows | None) -> None:
    if not lists[0]:
        return

    def run(lists: Lists, rows: Rows | None) -> bool:
        params = lists[0]
        return _plans.run(
            params,
            rows,
            lambda: _make_plan(params, rows),
            lambda plan: _call(plan, op, lists, options, rows),
        )

    if not run(lists, rows):
        in_parts(op, run, _walkable, fallback, lists, options, rows)


def _call(plan: _Plan, op: int, lists: Lists, options: dict[str, Any], rows: Rows | None) -> bool:
    table = None if rows is None else rows.table
    scaled = options.get("grad_scale") is not None
    addresses = plan.addresses.read(op, lists, () if table is None else row_arrays(table), scaled)
    if addresses is None:
        return False
    stream = cuda_library.stream(plan.addresses.device)
    call = cuda_library.Call(
        shapes=ctypes.addressof(plan.shapes),
        cuts=ctypes.addressof(plan.cuts),
        addresses=addresses,
        partials=plan.scratch_on(stream),
        stream=stream,
        hyper=_hyper(options, table),
        # Statistics alone are taken at any rate.
        lr=_scalar(options.get("lr", 1.0)),
        grad_scale=_scalar(options.get("grad_scale")),
        found_inf=_scalar(options.get("found_inf")),
        tensors=len(lists[0]),
        op=op,
        dtype=cuda_library.DTYPES[plan.addresses.dtype],
        device=plan.addresses.device.index or 0,
    )
    code = _target.library.sparsekern_cuda_step(call)
    cuda_library.check(_target.library, code, f"a list of {len(lists[0])} tensors")
    if op != STATISTICS:
        # Raw writes do not tell autograd that a saved tensor has changed.
        increment_version(lists[0])
    return True


def _hyper(options: dict[str, Any], table: RowTable | RowArrays | None) -> cuda_library.Hyper:
    hyper = (
        cuda_library.Hyper(tau=1.0, decay=0.0)
        if table is None
        else cuda_library.Hyper(tau=table.tau, decay=table.decay)
    )
    for name, value in options.items():
        if name not in ("lr", "grad_scale", "found_inf"):
            setattr(hyper, name, value)
    return hyper


def _scalar(value: float | Tensor | None) -> cuda_library.Scalar:
    if isinstance(value, Tensor):
        return cuda_library.Scalar(pointers.of_tensor(value), 0.0, cuda_library.DTYPES[value.dtype])
    return cuda_library.Scalar(None, 0.0 if value is None else value, 0)


def _walkable(param: Tensor) -> bool:
    return param.device.type == _target.device_type and param.dtype in cuda_library.DTYPES


def _make_plan(params: Sequence[Tensor], rows: Rows | None) -> _Plan | None:
    """A plan for all of ``params``; None when the kernels cannot walk one of them."""
    checks.inside(rows, params)
    starts, dims = where_rows_are(rows)
    shapes = memory_shapes(params, starts, dims, _walkable)
    if shapes is None:
        return None
    ends = [start + rows for _, rows, _, start in shapes if start >= 0]
    if max(ends, default=0) >= _MOST_ROWS:
        return None
    of_tensors = (cuda_library.Shape * len(shapes))(*(cuda_library.Shape(*shape) for shape in shapes))
    cuts = (cuda_library.Cut * len(shapes))()
    partials = _target.library.sparsekern_cuda_cut(of_tensors, len(shapes), params[0].element_size(), cuts)
    addresses = Addresses(params, max(ends, default=0), _target.dlpack_type)
    return _Plan(addresses, starts, dims, of_tensors, cuts, partials)
