"""Native kernels for tensors on NVIDIA GPUs: two launches per list, with the results of the reference.

The first launch makes the step and computes partial sums of the rows. The second launch adds these and
updates statistics and countdowns. All data about a list, addresses included, are arguments of the launches.
So calls after the first allocate no memory, the host never waits, and CUDA graphs can capture the calls. The
device reads learning rates, scales and ``found_inf`` that are tensors, and penalties, countdowns and masks.

Plans are made and compared as on the CPU (:mod:`~sparsekern.kernels.backends.cpu`).
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
    memory_shapes,
    row_arrays,
    run_in_parts,
    where_rows_are,
)
from sparsekern.kernels.native import cuda_library, pointers
from sparsekern.kernels.rows import ChannelArrays, RowArrays, Rows, RowTable

_plans = Plans()

# Scratch memory of captured graphs. It is never freed, because a graph may be replayed at any time.
_captured: list[Tensor] = []

# The counter of fold_moments for each stream, because launches on two streams may run at once.
_tickets: dict[int, Tensor] = {}

_MOMENT_DTYPES = (torch.int64, torch.int64, *[torch.float32] * 5)

# Upper limit (exclusive) of the number of rows in csrc/cuda/table.cuh.
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
    found = pointers.addresses_of_arrays(arrays, device) if fits else None
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
        *addresses, pointers.address_of(ticket), stream, channels, rows, table.decay, device.index or 0
    )
    cuda_library.check(_target.library, _target.library.sparsekern_cuda_moments(moments), "the channels")


@dataclass(slots=True)
class _Plan:
    """The launch parameters of a list, its expected tensors, and the memory of its partial sums.

    Attributes:
        addresses: the expected tensors; reads their addresses at each call.
        starts: first row of each tensor, -1 for an untracked one; None when no tensor is tracked.
        dims: row dimension of each tensor; None when no tensor is tracked.
        shapes: array of ``Shape``, one per tensor.
        cuts: array of ``Cut``, one per tensor.
        partials: number of partial sums; each has four float32 values.
        scratch: memory of the partial sums; None before the first call.
        stream: handle of the stream that uses ``scratch``.
        captured: whether a CUDA graph was captured with ``scratch``.
    """

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
        """Address of the memory for partial sums, allocated for ``stream``; None when none is needed."""
        if self.partials == 0:
            return None
        if self.scratch is None or self.stream != stream:
            self.scratch = torch.empty(self.partials * 4, dtype=torch.float32, device=self.addresses.device)
            self.stream, self.captured = stream, False
        if not self.captured and cuda_library.capturing():
            _captured.append(self.scratch)
            self.captured = True
        return pointers.address_of(self.scratch)


def _step(op: int, fallback: Any, lists: Lists, options: dict[str, Any], rows: Rows | None) -> None:
    """Run an op over a list: in one native call where possible, else in parts."""
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
        run_in_parts(op, run, _takes_kind, fallback, lists, options, rows)


def _call(plan: _Plan, op: int, lists: Lists, options: dict[str, Any], rows: Rows | None) -> bool:
    """Run ``plan``. Returns False, and changes nothing, when a tensor does not match the plan.

    Raises:
        RuntimeError: the kernels could not be launched.
    """
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
        # row_statistics_ has no learning rate; any value but 0 updates the statistics.
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
        # Autograd does not see raw writes, so the version of the tensors is raised here.
        increment_version(lists[0])
    return True


def _hyper(options: dict[str, Any], table: RowTable | RowArrays | None) -> cuda_library.Hyper:
    """The hyperparameters of a call that are plain numbers."""
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
    """A number, or the address and dtype of a one-element tensor."""
    if isinstance(value, Tensor):
        return cuda_library.Scalar(pointers.address_of(value), 0.0, cuda_library.DTYPES[value.dtype])
    return cuda_library.Scalar(None, 0.0 if value is None else value, 0)


def _takes_kind(param: Tensor) -> bool:
    """Whether the kernels take the device and dtype of ``param``; `memory_shape` checks the strides."""
    return param.device.type == _target.device_type and param.dtype in cuda_library.DTYPES


def _make_plan(params: Sequence[Tensor], rows: Rows | None) -> _Plan | None:
    """A plan for all of ``params``; None when the kernels cannot process one of them."""
    checks.inside(rows, params)
    starts, dims = where_rows_are(rows)
    shapes = memory_shapes(params, starts, dims, _takes_kind)
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
