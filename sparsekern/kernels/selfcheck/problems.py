"""Small problems for the ops on lists: odd shapes, every layout, rows in every state.

Guard bands surround every buffer, and the gaps between its strides hold poison, so a write or read outside of
a view is detected. All data are made on the CPU, whatever the default device and dtype are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsekern.kernels.rows import ChannelArrays, RowArrays, Rows, RowTable

GUARD = 64
"""Elements before and after a view. A view behind 63 elements is not aligned to 16 bytes."""

# (shape, dimension of the rows; None: untracked). Inner sizes 1, 2, 9, 31, 32, 33, 160, 4608 on 1, 3
# and 17 rows; rows behind an outer dimension; no rows, empty rows, no dimension.
SHAPES: tuple[tuple[tuple[int, ...], int | None], ...] = (
    ((1,), 0),
    ((3,), 0),
    ((17,), 0),
    ((17, 2), 0),
    ((3, 1, 3, 3), 0),
    ((17, 1, 3, 3), 0),
    ((1, 31), 0),
    ((3, 31), 0),
    ((17, 8, 2, 2), 0),
    ((7, 5), None),
    ((3, 33), 0),
    ((17, 33), 0),
    ((3, 40, 2, 2), 0),
    ((1, 512, 3, 3), 0),
    ((3, 512, 3, 3), 0),
    ((5, 3, 2, 2), 1),
    ((2, 17, 33), 1),
    ((9, 17), 1),
    ((4, 1, 3, 3), 1),
    ((70, 3, 2, 2), 1),
    ((2, 3, 4), 2),
    ((), None),
    ((0, 3, 3, 3), 0),
    ((3, 0), 0),
    ((2, 0, 3), 1),
    ((0,), None),
)

# Contiguous rows that end anywhere in a vector; lengths around the limits between two loops; rows of one
# element; more rows than a tile has.
ROW_LENGTHS: tuple[tuple[tuple[int, ...], int | None], ...] = (
    *(((19, length), 0) for length in (*range(7, 34), 47, 63, 64, 65, 255, 256)),
    *(((rows,), 0) for rows in (15, 16, 31, 33, 2049)),
    ((2051, 8), 0),
)

# Each of the ways that a tensor is cut: rows of a warp, of the block, in pieces; tiles of columns in pieces
# of outer and of inner indices, of several rows and of one; lengths that no power of two divides.
LARGE = (
    ((9, 1030), 0),
    ((5, 2049), 0),
    ((3, 2051 * 2), 0),
    ((2, 16392), 0),
    ((2, 20011), 0),
    ((1, 33000), 0),
    ((30001,), None),
    ((2100,), 0),
    ((300, 9), 0),
    ((200, 40, 2, 2), 1),
    ((37, 33, 3, 3), 1),
    ((70, 150), 1),
    ((3, 2, 300), 1),
    ((2, 3, 17000), 1),
)

# Memory layouts of the parameters, of the gradients and of the state.
LAYOUTS: dict[str, tuple[str, str, str]] = {
    "contiguous": ("contiguous", "contiguous", "contiguous"),
    "channels_last": ("channels_last", "channels_last", "channels_last"),
    "contiguous gradients": ("channels_last", "contiguous", "channels_last"),
    "contiguous state": ("channels_last", "channels_last", "contiguous"),
    "permuted": ("permuted", "permuted", "permuted"),
    "with holes": ("holes", "contiguous", "contiguous"),
    "all with holes": ("holes", "holes", "holes"),
}

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def strides_of(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Strides of a tensor of this shape in a layout of :data:`LAYOUTS`."""
    if layout == "channels_last" and len(shape) == 4:
        return torch.empty(shape, device="meta").to(memory_format=torch.channels_last).stride()
    if layout == "permuted":
        return torch.empty(shape[::-1], device="meta").stride()[::-1]
    if layout == "holes" and shape:
        return torch.empty((*shape[:-1], 2 * shape[-1] + 1), device="meta")[..., ::2].stride()
    return torch.empty(shape, device="meta").stride()


@dataclass
class Guarded:
    """A view into a buffer whose other elements are poison."""

    buffer: Tensor
    view: Tensor

    @classmethod
    def of(cls, values: Tensor, layout: str = "contiguous", guard: int = GUARD) -> Guarded:
        """A copy of ``values`` in a layout, with ``guard`` elements of poison on both sides."""
        strides = strides_of(tuple(values.shape), layout)
        span = 0
        if values.numel():
            span = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
        poison = float("nan") if values.is_floating_point() else -77777
        buffer = torch.full((span + 2 * guard,), poison, dtype=values.dtype, device="cpu")
        view = buffer.as_strided(values.shape, strides, guard)
        view.copy_(values)
        return cls(buffer, view)

    def inside(self, buffer: Tensor) -> Tensor:
        """The view of another buffer that lies as :attr:`view` does in its own."""
        start = self.view.storage_offset() - self.buffer.storage_offset()
        return buffer.as_strided(self.view.shape, self.view.stride(), buffer.storage_offset() + start)

    def clone(self) -> Guarded:
        """A copy of the buffer, and the same view of it."""
        buffer = self.buffer.clone()
        return Guarded(buffer, self.inside(buffer))

    def outside_is_untouched(self) -> bool:
        """Whether all elements outside of the view are still poison."""
        probe = self.buffer.clone()
        poison = probe[0].clone()
        self.inside(probe).fill_(poison)
        return bool((probe.isnan() if probe.is_floating_point() else probe == poison).all())


@dataclass
class Problem:
    """The data of one call.

    Attributes:
        tensors: the lists of tensors by name, one tensor per shape.
        arrays: the arrays of the row table by name.
        starts, dims: first row and row dimension of each tensor, as in :class:`Rows`.
        decay, tau: of the row table.
        params: the tensors of the list ``params`` as parameters.
    """

    tensors: dict[str, list[Guarded]]
    arrays: dict[str, Guarded]
    starts: list[int]
    dims: list[int]
    decay: float = 0.9
    tau: float = 1.25
    params: list[Parameter] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.params = [Parameter(guarded.view) for guarded in self.tensors["params"]]

    def clone(self) -> Problem:
        """A copy that shares no memory."""
        return self._with([guarded.clone() for guarded in self._all()])

    def on(self, device: torch.device) -> Problem:
        """A copy on ``device``, strides, poison and alignment included; one transfer for each dtype."""
        every = self._all()
        buffers = _transferred([guarded.buffer for guarded in every], device)
        return self._with([Guarded(b, g.inside(b)) for g, b in zip(every, buffers, strict=True)])

    def _all(self) -> list[Guarded]:
        return [g for gs in self.tensors.values() for g in gs] + [*self.arrays.values()]

    def _with(self, every: Iterable[Guarded]) -> Problem:
        """The same problem with other tensors, in the order of :meth:`_all`."""
        left = iter(every)
        tensors = {name: [next(left) for _ in gs] for name, gs in self.tensors.items()}
        arrays = {name: next(left) for name in self.arrays}
        return Problem(tensors, arrays, self.starts, self.dims, self.decay, self.tau)

    def list(self, name: str) -> list[Any]:
        """The list of tensors of that name, as an op takes it."""
        if name == "params":
            return list(self.params)
        return [guarded.view for guarded in self.tensors[name]]

    @property
    def rows(self) -> Rows:
        """The rows of the parameters, with the arrays of the table."""
        views = [self.arrays[name].view for name in RowArrays._fields[:-2]]
        return Rows(RowArrays._make([*views, self.tau, self.decay]), self.starts, self.dims)

    def entries(self) -> dict[str, Guarded]:
        """All tensors and arrays, each with a readable name."""
        named = {
            f"{name}[{i}] {list(guarded.view.shape)}": guarded
            for name, guardeds in self.tensors.items()
            for i, guarded in enumerate(guardeds)
        }
        return named | self.arrays

    def copy_(self, other: Problem) -> None:
        """Copy the values of another Problem."""
        for mine, theirs in zip(self.entries().values(), other.entries().values(), strict=True):
            mine.view.copy_(theirs.view)


STATES = ("momentum_buffers", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")

# Share of masked rows, and share of fading rows among the others.
ROW_STATES: dict[str, tuple[float, float]] = {
    "all live": (0.0, 0.0),
    "some masked, some fading": (0.4, 0.3),
    "all fading": (0.0, 1.0),
    "all masked": (1.0, 0.0),
}


def problem(
    dtype: torch.dtype,
    layout: str,
    row_state: str,
    *,
    seed: int = 0,
    shapes: Sequence[tuple[tuple[int, ...], int | None]] = SHAPES,
    guard: int = GUARD,
) -> Problem:
    """A Problem with state as in mid-training. Gradients of masked rows are NaN.

    Args:
        dtype: dtype of parameters, gradients and state.
        layout: a name of :data:`LAYOUTS`.
        row_state: a name of :data:`ROW_STATES`.
        seed: seed of the random numbers.
        shapes: shape and row dimension of each parameter.
        guard: number of elements before each tensor of a list.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def randn(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * scale

    params = [Parameter(randn(shape).to(dtype)) for shape, _ in shapes]
    tracked = [(p, d) for p, (_, d) in zip(params, shapes, strict=True) if d is not None]
    table = RowTable(tracked, [])
    table.penalty.copy_(randn((len(table.penalty),)).clamp(min=0) * 0.5)
    for number, view in enumerate(table.views):
        # Every third parameter has columns that do not count.
        table.elements[view.slice].div_(1 + (number % 3 == 0)).ceil_()
    table.threshold.copy_(randn((len(table.penalty),)).abs())
    table.threshold[::5] = float("inf")
    table.activity.copy_(_rand(len(table.penalty), generator))
    table.sums.copy_(randn((len(table.penalty), 4)))
    masked, fading = ROW_STATES[row_state]
    drawn = _rand(len(table.penalty), generator)
    steps_left = torch.randint(1, 4, drawn.shape, generator=generator, dtype=torch.int32, device="cpu")
    table.countdown[drawn < masked + (1 - masked) * fading] = 0
    table.countdown.copy_(torch.where(table.countdown == 0, steps_left, table.countdown))
    table.countdown[drawn < masked] = 0

    grads = [randn(shape, 0.7).to(dtype) for shape, _ in shapes]
    states = {
        "momentum_buffers": [randn(shape, 0.7).to(dtype) for shape, _ in shapes],
        "exp_avgs": [randn(shape, 0.7).to(dtype) for shape, _ in shapes],
        "exp_avg_sqs": [randn(shape).square().to(dtype) for shape, _ in shapes],
        "max_exp_avg_sqs": [randn(shape).square().to(dtype) for shape, _ in shapes],
    }
    position = {id(param): i for i, param in enumerate(params)}
    table.zero_masked(lambda param: [state[position[id(param)]] for state in states.values()])
    for view in table.views:
        dead = table.countdown[view.slice] == 0
        grads[position[id(view.param)]].movedim(view.dim, 0)[dead] = float("nan")

    of_params, of_grads, of_states = LAYOUTS[layout]
    tensors = {
        "params": [Guarded.of(p.detach(), of_params, guard) for p in params],
        "grads": [Guarded.of(g, of_grads, guard) for g in grads],
        "steps": [Guarded.of(_number(float(i % 3)), guard=guard) for i in range(len(params))],
    } | {name: [Guarded.of(t, of_states, guard) for t in ts] for name, ts in states.items()}
    arrays = {name: Guarded.of(getattr(table, name), guard=guard) for name in RowArrays._fields[:-2]}
    rows = table.rows_of(params)
    return Problem(tensors, arrays, rows.starts, rows.dims)


def channel_arrays(channels: int, pending: float) -> ChannelArrays:
    """Arrays after a step and before the means per channel: 40 rows, 0 to 3 gates a channel, fixed seed."""
    generator = torch.Generator("cpu").manual_seed(7)

    def randint(high: int, size: int) -> Tensor:
        return torch.randint(0, high, (size,), generator=generator, dtype=torch.int64, device="cpu")

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    counts = randint(4, channels)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    gates = randint(40, int(offsets[-1]))
    generator.manual_seed(8)
    sums, means = randn(40, 4), randn(2, channels)
    return ChannelArrays(offsets, gates, sums, means[0], means[1].abs(), _number(5.0), _number(pending), 0.9)


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _rand(size: int, generator: torch.Generator) -> Tensor:
    return torch.rand(size, generator=generator, dtype=torch.float32, device="cpu")


_STEP = 64
"""Multiple of elements at which buffers begin in a transfer, at least 128 bytes. Accesses of 16 bytes fit."""


def _transferred(buffers: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of the buffers on ``device``, each aligned as a tensor of its own is."""
    moved: dict[int, Tensor] = {}
    for dtype in {buffer.dtype for buffer in buffers}:
        chosen = [i for i, buffer in enumerate(buffers) if buffer.dtype is dtype]
        padded = [_STEP * -(-buffers[i].numel() // _STEP) for i in chosen]
        parts = [
            part
            for i, size in zip(chosen, padded, strict=True)
            for part in (buffers[i], buffers[i].new_empty(size - buffers[i].numel()))
        ]
        whole, start = torch.cat(parts).to(device), 0
        for i, size in zip(chosen, padded, strict=True):
            moved[i] = whole[start : start + buffers[i].numel()]
            start += size
    return [moved[i] for i in range(len(buffers))]
