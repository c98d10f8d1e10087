"""A list of tensors for the kernels: its chunks, its table on the device, and the launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from sparsekern.kernels.backends.addresses import SLOTS, Addresses, AddressPlan
from sparsekern.kernels.backends.lists import MemoryShape, needed_rows
from sparsekern.kernels.backends.triton import finish_kernels, step_kernels
from sparsekern.kernels.backends.triton.launch import DEVICE_TYPE, OPTIONS, STORAGE, compute_type, device_of
from sparsekern.kernels.backends.triton.table import FIELDS, HEAD, NUMBERS
from sparsekern.kernels.backends.triton.table import OPTIONS as FLAGS
from sparsekern.kernels.native import cuda_library, pointers
from sparsekern.kernels.options import ADAM, HYPER, STEPS, Options, Scaling, hyper
from sparsekern.kernels.rows import ROW_ARRAYS, Table

_LONG, _MEDIUM, _SHORT, _BEHIND = 0, 2, 4, 5
"""Indices in ``VARIANTS``. ``_LONG`` and ``_MEDIUM`` use aligned accesses of 16 bytes; the next index of each
is the same variant without them. ``_BEHIND`` is for short rows behind an outer dimension."""

# Tiles per chunk: enough to hide the cost of a program, few enough to divide small networks among programs.
_TILES = 8

# Warps per program. With 4 warps the float64 kernels spill registers.
WARPS = {dtype: 8 if dtype is torch.float64 else 4 for dtype in STORAGE}

# Rows per block of the `finish` kernel.
_FINISHED = 512

# Elements of a piece of a long row, and of the longest row that is not divided into pieces.
_PIECE, _WHOLE = 8 * 1024, 16 * 1024

# A multiple of this number of elements allows accesses of 16 bytes in every dtype.
_ALIGNED = 16

# DLPack's device types: 1 is CPU, 2 is CUDA, 10 is ROCm.
_DLPACK_TYPE = 1 if DEVICE_TYPE == "cpu" else 2 if torch.version.hip is None else 10

# Captured steps of a list for which a step outside of captures pins memory in advance.
_SPARES = 4

# Memory that captured CUDA graphs read on replay. It is never freed, because nothing reports the last replay.
captured: list[tuple[Tensor, ...]] = []


class Cut(NamedTuple):
    """Division of a tensor into chunks.

    Attributes:
        variant: index in ``VARIANTS``.
        outer_step: outer indices per chunk.
        row_step: rows per chunk.
        inner_step: inner elements per chunk.
        pieces: chunks that share the same rows.
        chunks: number of all chunks.
    """

    variant: int
    outer_step: int
    row_step: int
    inner_step: int
    pieces: int
    chunks: int


def cut_of(outer: int, rows: int, inner: int) -> Cut:
    """The division of a tensor ``[outer, rows, inner]``; it depends on the shape alone."""
    if inner > 256:
        variant = _LONG
    elif inner > 32:
        variant = _MEDIUM
    else:
        variant = _SHORT if outer == 1 else _BEHIND
    outers, many, inners, _ = step_kernels.VARIANTS.value[variant]
    inner_step = inner if inner <= _WHOLE else _PIECE
    tiles = max(1, _TILES // triton.cdiv(inner_step, inners))
    row_step = min(rows, many * tiles) if outer == 1 else many
    outer_step = 1 if outer == 1 else outers * tiles
    pieces = triton.cdiv(outer, outer_step) * triton.cdiv(inner, inner_step)
    chunks = pieces * triton.cdiv(rows, row_step)
    if variant in (_LONG, _MEDIUM) and inner % _ALIGNED != 0:
        variant += 1
    return Cut(variant, outer_step, row_step, inner_step, pieces, chunks)


@dataclass(slots=True, kw_only=True)
class Plan(AddressPlan):
    """Division of a list into chunks, the expected tensors, and their tables on the device.

    Attributes:
        shapes: int64 ``[tensors, FIELDS]`` on the device.
        owners: int32 ``[chunks]`` on the device, the tensor of each chunk.
        variants: int64 ``[tensors]``, indices in ``VARIANTS``.
        partials: number of rows of partial sums.
        table: the device table of the last call outside a graph capture, or None.
        scratch: memory for the partial sums, float32 with 4 numbers per row, or None.
        spares: pinned host memory for the next graph captures, ``_SPARES`` after a call outside of a capture.
        stream: stream of the last call outside a graph capture; -1 for none.
        sent: content of ``table`` as numbers and addresses, or None.
    """

    shapes: Tensor
    owners: Tensor
    variants: np.ndarray
    partials: int
    table: Tensor | None = None
    scratch: Tensor | None = None
    spares: list[Tensor] = field(default_factory=list)
    stream: int = -1
    sent: tuple[bytes, bytes] | None = None

    def launch(
        self, op: int, addresses: bytes, options: Options, table: Table | None, scaling: Scaling
    ) -> None:
        """See :meth:`AddressPlan.launch`."""
        device, dtype = self.addresses.device, self.addresses.dtype
        tracks = table is not None and any(start >= 0 for start in self.starts or ())
        values = dict(zip(HYPER, hyper(op, options, table), strict=True))
        lr = options.lr if isinstance(options.lr, Tensor) else None
        compiled = {"OP": op, "FLAGS": _flags(op, values, tracks), **OPTIONS}
        with device_of(self.shapes):
            stream = cuda_library.stream(device) if DEVICE_TYPE == "cuda" else 0
            numbers = np.array([float(values[name]) for name in NUMBERS]).tobytes()
            known = self.table_on(stream, numbers, addresses), self.shapes
            step_kernels.step[(len(self.owners),)](
                *known,
                self.owners,
                lr,
                *scaling,
                STORAGE=STORAGE[dtype],
                COMPUTE=compute_type(dtype),
                num_warps=WARPS[dtype],
                **compiled,
            )
            if tracks or op == ADAM:
                finish_kernels.finish[(len(self.variants),)](
                    *known, lr, scaling.found_inf, BLOCK=_FINISHED, **compiled
                )

    def table_on(self, stream: int, numbers: bytes, addresses: bytes) -> Tensor:
        """The device table with this content, for kernels that are launched next on ``stream``.

        Args:
            stream: handle of the current stream; 0 on the CPU.
            numbers: hyperparameters, float64 in the order of ``NUMBERS``.
            addresses: int64 addresses of the tensors, then of the row arrays.
        """
        device, content = self.addresses.device, (numbers, addresses)
        if _is_capturing(device):
            host = self._spare()
            table, scratch = self._new()
            captured.append((host, table, scratch, self.shapes, self.owners))
        else:
            if self.table is None or self.scratch is None or self.stream != stream:
                self.table, self.scratch = self._new()
                self.stream, self.sent = stream, None
            if self.sent == content:
                return self.table
            while len(self.spares) < _SPARES:
                self.spares.append(self._pinned())
            # Each call pins new memory. torch does not reuse it before the copy has read it.
            host, table, scratch = self._pinned(), self.table, self.scratch
            self.sent = content
        host.numpy()[:] = self._words(numbers, addresses, pointers.address_of(scratch))
        table.copy_(host, non_blocking=True)
        return table

    def _spare(self) -> Tensor:
        """Host memory for one call in a capture, pinned before it: not every torch can pin memory then.

        Raises:
            RuntimeError: there is none left, and torch cannot pin memory now.
        """
        if self.spares:
            return self.spares.pop()
        try:
            return self._pinned()
        except RuntimeError as error:
            raise RuntimeError(
                "optimizer: got a step in the capture of a CUDA graph without pinned memory for it, expected "
                f"a step outside of captures before it, and again after {_SPARES} captured steps ({error})"
            ) from error

    def _words(self, numbers: bytes, addresses: bytes, scratch: int) -> np.ndarray:
        """The int64 content of the table; see :mod:`sparsekern.kernels.backends.triton.table`."""
        of = np.frombuffer(addresses, np.int64)
        addresses_of_lists, addresses_of_arrays = (
            of[: -len(ROW_ARRAYS)].reshape(SLOTS, -1),
            of[-len(ROW_ARRAYS) :],
        )
        unaligned = (addresses_of_lists[:STEPS] % 16 != 0).any(0)
        variants = self.variants + (unaligned & np.isin(self.variants, (_LONG, _MEDIUM)))
        head = [len(variants), scratch]
        return np.concatenate(
            [
                np.frombuffer(numbers, np.int64),
                head,
                addresses_of_arrays,
                addresses_of_lists.ravel(),
                variants,
            ]
        )

    def _new(self) -> tuple[Tensor, Tensor]:
        """New device memory for the table and the partial sums."""
        device, tensors = self.addresses.device, len(self.variants)
        words = HEAD.value + (SLOTS + 1) * tensors
        table = torch.empty(words, dtype=torch.int64, device=device)
        return table, torch.empty(max(1, self.partials) * 4, dtype=torch.float32, device=device)

    def _pinned(self) -> Tensor:
        """New host memory for the table, pinned for a CUDA device."""
        words = HEAD.value + (SLOTS + 1) * len(self.variants)
        return torch.empty(
            words, dtype=torch.int64, device="cpu", pin_memory=self.addresses.device.type == "cuda"
        )


def _flags(op: int, values: dict[str, float], tracks: bool) -> int:
    """The options that are compiled into the kernels, as bits in the order of ``table.OPTIONS``."""
    derived = {
        "has_momentum": values["momentum"] != 0,
        "lerp_from_start": op == ADAM and 1 - values["beta1"] < 0.5,
        "tracks": tracks,
    }
    return sum(1 << i for i, name in enumerate(FLAGS) if (values | derived)[name])


def make_plan(params: Sequence[Tensor], shapes: list[MemoryShape]) -> Plan:
    """A plan for ``params`` with these shapes in memory."""
    device = params[0].device
    entries = np.empty((len(shapes), FIELDS.value), np.int64)
    variants = np.empty(len(shapes), np.int64)
    chunks = np.empty(len(shapes), np.int64)
    partials = first = 0
    for i, (outer, height, inner, start) in enumerate(shapes):
        cut = cut_of(outer, height, inner)
        steps = cut.outer_step, cut.row_step, cut.inner_step, cut.pieces
        entries[i] = outer, height, inner, start, *steps, partials, first
        variants[i], chunks[i] = cut.variant, cut.chunks
        first += cut.chunks
        if start >= 0 and cut.pieces > 1:
            partials += cut.pieces * height
    return Plan(
        addresses=Addresses(params, needed_rows(shapes), _DLPACK_TYPE),
        shapes=torch.from_numpy(entries).to(device),
        owners=torch.from_numpy(np.repeat(np.arange(len(shapes), dtype=np.int32), chunks)).to(device),
        variants=variants,
        partials=partials,
    )


def _is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and cuda_library.capturing()


def takes_kind(param: Tensor) -> bool:
    """Whether the kernels support the dtype and device of ``param``."""
    return param.device.type == DEVICE_TYPE and param.dtype in STORAGE
