"""Optimizer steps in Triton: two launches per list, equal to the reference.

This backend is the counterpart of :mod:`sparsekern.kernels.backends.cuda` for GPUs without the compiled CUDA
library. It is tested in Triton's interpreter and has never run on a GPU. A table on the device describes each
list to the kernels. The table is sent again only when its content changes: the address of a gradient, or a
number that is not a tensor, such as a learning rate. A training loop with constant addresses and numbers
sends nothing. Each captured graph has its own table.

With ``TRITON_INTERPRET=1``, set before triton is imported, the backend takes tensors on the CPU.
"""

from __future__ import annotations

import torch
import triton

from sparsekern.kernels.backends.planned import PlannedSteps
from sparsekern.kernels.backends.triton import finish_kernels
from sparsekern.kernels.backends.triton.launch import OPTIONS, device_of
from sparsekern.kernels.backends.triton.plan import make_plan, takes_kind
from sparsekern.kernels.rows import DOT, ChannelArrays, RowTable

# Channels per program of `fold_channels`.
_FOLDED = 256


@torch.no_grad()
def channel_moments_(table: RowTable | ChannelArrays) -> None:
    """See :func:`sparsekern.kernels.backends.reference.step.channel_moments_`."""
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


_steps = PlannedSteps(takes_kind, make_plan)

step_ = _steps.step_
"""See :func:`sparsekern.kernels.backends.reference.step.step_`."""
