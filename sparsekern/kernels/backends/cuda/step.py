"""Native kernels for tensors on NVIDIA GPUs: two launches per list, with the results of the reference.

The first launch makes the step and computes partial sums of the rows. The second launch adds these and
updates statistics and countdowns. All data about a list, addresses included, are arguments of the launches.
So calls after the first allocate no memory, the host never waits, and CUDA graphs can capture the calls. The
device reads learning rates, scales and ``found_inf`` that are tensors, and penalties, countdowns and masks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekern.kernels.backends import reference
from sparsekern.kernels.backends.addresses import Addresses, AddressPlan
from sparsekern.kernels.backends.lists import MemoryShape, channel_arrays, needed_rows
from sparsekern.kernels.backends.planned import PlannedSteps
from sparsekern.kernels.native import cuda_library, pointers
from sparsekern.kernels.options import Options, Scaling, hyper
from sparsekern.kernels.rows import ChannelArrays, RowTable, Table

# Scratch memory of captured graphs. It is never freed, because a graph may be replayed at any time.
_captured: list[Tensor] = []

# The counter of fold_moments for each table, by the device and the address of its `pending`. Two launches
# over one table never run at once, because both write its arrays. A captured graph keeps the address.
_tickets: dict[tuple[torch.device, int], Tensor] = {}

_MOMENT_DTYPES = (torch.int64, torch.int64, *[torch.float32] * 5)

# Upper limit (exclusive) of the number of rows in csrc/cuda/table.cuh.
_MOST_ROWS = 1 << 31


_target = cuda_library.Target(cuda_library.load(), "cuda", cuda_library.DEVICE_TYPE)


@dataclass(slots=True, kw_only=True)
class _Plan(AddressPlan):
    """The launch parameters of a list, its expected tensors, and the memory of its partial sums.

    Attributes:
        shapes: array of ``Shape``, one per tensor.
        cuts: array of ``Cut``, one per tensor.
        partials: number of partial sums; each has four float32 values.
        scratch: memory of the partial sums; None before the first call.
        stream: handle of the stream that uses ``scratch``.
        captured: whether a CUDA graph was captured with ``scratch``.
    """

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

    def launch(
        self, op: int, addresses: bytes, options: Options, table: Table | None, scaling: Scaling
    ) -> None:
        """See :meth:`AddressPlan.launch`."""
        stream, tensors = cuda_library.stream(self.addresses.device), len(self.shapes)
        call = cuda_library.Call(
            shapes=ctypes.addressof(self.shapes),
            cuts=ctypes.addressof(self.cuts),
            addresses=addresses,
            partials=self.scratch_on(stream),
            stream=stream,
            hyper=cuda_library.Hyper(*hyper(op, options, table)),
            lr=_scalar(options.lr),
            grad_scale=_scalar(scaling.grad_scale),
            found_inf=_scalar(scaling.found_inf),
            tensors=tensors,
            op=op,
            dtype=cuda_library.DTYPES[self.addresses.dtype],
            device=self.addresses.device.index or 0,
        )
        code = _target.library.sparsekern_cuda_step(call)
        cuda_library.check(_target.library, code, f"a list of {tensors} tensors")


def _scalar(value: float | Tensor | None) -> cuda_library.Scalar:
    """A number, or the address and dtype of a one-element tensor."""
    if isinstance(value, Tensor):
        return cuda_library.Scalar(pointers.address_of(value), 0.0, cuda_library.DTYPES[value.dtype])
    return cuda_library.Scalar(None, 0.0 if value is None else value, 0)


def _takes_kind(param: Tensor) -> bool:
    """Whether the kernels take the device and dtype of ``param``."""
    return param.device.type == _target.device_type and param.dtype in cuda_library.DTYPES


def _make_plan(params: Sequence[Tensor], shapes: list[MemoryShape]) -> _Plan | None:
    rows = needed_rows(shapes)
    if rows >= _MOST_ROWS:
        return None
    of_tensors = (cuda_library.Shape * len(shapes))(*(cuda_library.Shape(*shape) for shape in shapes))
    cuts = (cuda_library.Cut * len(shapes))()
    partials = _target.library.sparsekern_cuda_cut(of_tensors, len(shapes), params[0].element_size(), cuts)
    addresses = Addresses(params, rows, _target.dlpack_type)
    return _Plan(addresses=addresses, shapes=of_tensors, cuts=cuts, partials=partials)


def channel_moments_(table: RowTable | ChannelArrays) -> None:
    """See :func:`sparsekern.kernels.backends.reference.step.channel_moments_`."""
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
    ticket = _ticket_of(device, addresses[-1])
    moments = cuda_library.Moments(
        *addresses, pointers.address_of(ticket), stream, channels, rows, table.decay, device.index or 0
    )
    cuda_library.check(_target.library, _target.library.sparsekern_cuda_moments(moments), "the channels")


def _ticket_of(device: torch.device, pending: int) -> Tensor:
    """The counter of the table whose ``pending`` is at this address; it is 0 between two launches.

    A capture does not run what it records. So a counter that is made in a capture is set to 0 in each replay
    of that graph, and no other launch may use it.
    """
    ticket = _tickets.get((device, pending))
    if ticket is None:
        ticket = torch.zeros((), dtype=torch.int32, device=device)
        if not cuda_library.capturing():
            _tickets[device, pending] = ticket
    return ticket


_steps = PlannedSteps(_takes_kind, _make_plan)

step_ = _steps.step_
"""See :func:`sparsekern.kernels.backends.reference.step.step_`."""
