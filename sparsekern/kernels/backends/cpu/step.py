"""Native kernels for tensors on the CPU: one call per list, with the same results as the reference.

A plan (:mod:`~sparsekern.kernels.backends.planned`) stores the memory shape of each tensor and the chunks for
the threads. Each call reads the addresses again and compares dtype, sizes and strides of every tensor with
the plan, in native code.
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
from sparsekern.kernels.backends.lists import MemoryShape, channel_arrays, row_arrays
from sparsekern.kernels.backends.planned import Plan, PlannedSteps
from sparsekern.kernels.native import pointers
from sparsekern.kernels.options import (
    STATISTICS,
    STEPS,
    Lists,
    Options,
    Scaling,
    hyper,
    with_rate,
)
from sparsekern.kernels.rows import ChannelArrays, Rows, RowTable

_CPU = torch.device("cpu")

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_MISFIT = -1


@dataclass(slots=True, kw_only=True)
class _Plan(Plan):
    """A native plan and the tensors that it fits.

    Attributes:
        native: the plan of the native module.
        layouts: sizes and strides of each tensor.
        dtype: dtype of all tensors.
    """

    native: Any
    layouts: list[pointers.Layout]
    dtype: torch.dtype

    def run(self, op: int, lists: Lists, options: Options, rows: Rows | None, scaling: Scaling) -> bool:
        """See :meth:`Plan.run`."""
        grad_scale, found_inf = scaling
        if found_inf is not None and float(found_inf) == 1:
            return True
        if isinstance(options.lr, Tensor):
            options = with_rate(options, float(options.lr))
        table = None if rows is None else rows.table
        arrays = () if table is None else row_arrays(table)
        values = hyper(op, options, table, None if grad_scale is None else float(grad_scale))
        update_statistics = options.lr != 0
        threads = torch.get_num_threads()
        if op != STATISTICS:
            # Autograd does not see raw writes, so the version is raised here. It is raised before the call,
            # while the metadata of the tensors is in the caches. If the call is then not made, the version
            # rises once more than necessary.
            increment_version(lists[0])
        if _native.exchanges:
            code = _C.step(self.native, op, lists, arrays, values, update_statistics, threads)
        else:
            addresses = pointers.addresses_of_lists(lists, self.layouts, self.dtype, STEPS, _CPU)
            flat = pointers.addresses_of_arrays(arrays, _CPU)
            if addresses is None or flat is None:
                return False
            code = _C.step_at(self.native, op, addresses, flat, values, update_statistics, threads)
        if code > 0:
            raise RuntimeError(f"the native kernels refused a list of {len(lists[0])} tensors (error {code})")
        return bool(code != _MISFIT)


def _takes_kind(param: Tensor) -> bool:
    """Whether the kernels take the device and dtype of ``param``."""
    return param.device.type == "cpu" and param.dtype in _DTYPES


def _make_plan(params: Sequence[Tensor], shapes: list[MemoryShape]) -> _Plan:
    dtype = params[0].dtype
    layouts = [pointers.layout(param) for param in params]
    return _Plan(native=_C.plan(_DTYPES[dtype], layouts, shapes), layouts=layouts, dtype=dtype)


def channel_moments_(table: RowTable | ChannelArrays) -> None:
    """See :func:`sparsekern.kernels.backends.reference.step.channel_moments_`."""
    if not _C.step_channels(channel_arrays(table), table.decay):
        _checks.channels(table)
        reference.channel_moments_(table)


_C: Any = _native.load()
"""The compiled kernels for tensors on the CPU."""

_steps = PlannedSteps(_takes_kind, _make_plan)

step_ = _steps.step_
"""See :func:`sparsekern.kernels.backends.reference.step.step_`."""
