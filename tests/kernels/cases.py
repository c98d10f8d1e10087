"""Lists of tensors to make steps with: odd shapes, every layout, rows in every state.

Guard bands surround every buffer, and the gaps between its strides hold poison, so a write or read
outside of a view is detected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsekern.kernels.options import NAMES, OPTIONS, Scaling
from sparsekern.kernels.rows import ChannelArrays, RowArrays, Rows, RowTable

GUARD = 64

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
    def of(cls, values: Tensor, layout: str = "contiguous") -> Guarded:
        strides = strides_of(tuple(values.shape), layout)
        span = 0
        if values.numel():
            span = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
        poison = float("nan") if values.is_floating_point() else -77777
        buffer = torch.full((span + 2 * GUARD,), poison, dtype=values.dtype)
        view = buffer.as_strided(values.shape, strides, GUARD)
        view.copy_(values)
        return cls(buffer, view)

    def clone(self) -> Guarded:
        buffer = self.buffer.clone()
        view = self.view
        return Guarded(buffer, buffer.as_strided(view.shape, view.stride(), view.storage_offset()))

    def outside_is_untouched(self) -> bool:
        probe = self.buffer.clone()
        view = self.view
        poison = probe[0].clone()
        probe.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(poison)
        return bool((probe.isnan() if probe.is_floating_point() else probe == poison).all())


@dataclass
class Problem:
    """The data of one call by name: `tensors` holds lists over SHAPES, `arrays` the arrays of the table."""

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
        return Problem(
            {name: [g.clone() for g in gs] for name, gs in self.tensors.items()},
            {name: g.clone() for name, g in self.arrays.items()},
            self.starts,
            self.dims,
            self.decay,
            self.tau,
        )

    def list(self, name: str) -> list[Any]:
        if name == "params":
            return list(self.params)
        return [guarded.view for guarded in self.tensors[name]]

    @property
    def rows(self) -> Rows:
        views = (self.arrays[name].view for name in RowArrays._fields[:-2])
        return Rows(RowArrays(*views, self.tau, self.decay), self.starts, self.dims)

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
) -> Problem:
    """A Problem over ``shapes`` with state as in mid-training. Gradients of masked rows are NaN."""
    generator = torch.Generator().manual_seed(seed)

    def randn(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    params = [Parameter(randn(shape).to(dtype)) for shape, _ in shapes]
    tracked = [(p, d) for p, (_, d) in zip(params, shapes, strict=True) if d is not None]
    table = RowTable(tracked, [])
    table.penalty.copy_(randn((len(table.penalty),)).clamp(min=0) * 0.5)
    for number, view in enumerate(table.views):
        # Every third parameter has columns that do not count.
        table.elements[view.slice].div_(1 + (number % 3 == 0)).ceil_()
    table.threshold.copy_(randn((len(table.penalty),)).abs())
    table.threshold[::5] = float("inf")
    table.activity.copy_(torch.rand(len(table.penalty), generator=generator))
    table.sums.copy_(randn((len(table.penalty), 4)))
    masked, fading = ROW_STATES[row_state]
    drawn = torch.rand(len(table.penalty), generator=generator)
    steps_left = torch.randint(1, 4, drawn.shape, generator=generator, dtype=torch.int32)
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
        "params": [Guarded.of(p.detach(), of_params) for p in params],
        "grads": [Guarded.of(g, of_grads) for g in grads],
        "steps": [Guarded.of(torch.tensor(float(i % 3))) for i in range(len(params))],
    } | {name: [Guarded.of(t, of_states) for t in ts] for name, ts in states.items()}
    arrays = {name: Guarded.of(getattr(table, name)) for name in RowArrays._fields[:-2]}
    rows = table.rows_of(params)
    return Problem(tensors, arrays, rows.starts, rows.dims)


def channel_arrays(channels: int, pending: float) -> ChannelArrays:
    """Arrays after a step and before the means per channel: 40 rows, 0 to 3 gates a channel, fixed seed."""
    generator = torch.Generator().manual_seed(7)
    counts = torch.randint(0, 4, (channels,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    gates = torch.randint(0, 40, (int(offsets[-1]),), generator=generator)
    generator.manual_seed(8)
    sums = torch.randn(40, 4, generator=generator)
    means = torch.randn(2, channels, generator=generator)
    return ChannelArrays(
        offsets, gates, sums, means[0], means[1].abs(), torch.tensor(5.0), torch.tensor(pending), 0.9
    )


@dataclass(frozen=True)
class Op:
    """One op with the lists it takes and one setting of its options."""

    name: str
    lists: tuple[str, ...]
    options: dict[str, Any]

    def call(self, backend: Any, on: Problem) -> None:
        lists = (on.list(name) if name else [] for name in self.lists)
        run_op(backend, self.name, *lists, **self.options, rows=on.rows)


def run_op(backend: Any, name: str, *lists: Any, rows: Rows | None, **values: Any) -> None:
    """One op of a backend, or of the module of the front functions.

    Args:
        backend: has the function ``step_``.
        name: name of the op.
        lists: its lists.
        rows: the rows.
        values: the fields of its options, and ``grad_scale`` and ``found_inf``.
    """
    op = NAMES.index(name)
    scaling = Scaling(values.pop("grad_scale", None), values.pop("found_inf", None))
    backend.step_(op, lists, OPTIONS[op](**values), rows, scaling)


SGD = dict(
    lr=0.05,
    momentum=0.0,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    maximize=False,
    first=False,
    grad_scale=None,
    found_inf=None,
)
ADAM = dict(
    lr=0.01,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    decoupled=False,
    amsgrad=False,
    maximize=False,
    grad_scale=None,
    found_inf=None,
)


def _sgd(**options: Any) -> Op:
    options = SGD | options
    buffers = "momentum_buffers" if options["momentum"] else ""
    return Op("sgd_step_", ("params", "grads", buffers), options)


def _adam(**options: Any) -> Op:
    options = ADAM | options
    top = "max_exp_avg_sqs" if options["amsgrad"] else ""
    return Op("adam_step_", ("params", "grads", "exp_avgs", "exp_avg_sqs", top, "steps"), options)


def one(value: float) -> Tensor:
    return torch.tensor(value)


OPS: dict[str, Op] = {
    "sgd": _sgd(),
    "sgd decay maximize": _sgd(weight_decay=0.1, maximize=True),
    "sgd momentum first": _sgd(momentum=0.9, dampening=0.3, first=True),
    "sgd momentum": _sgd(momentum=0.9, dampening=0.3, weight_decay=0.1),
    "sgd nesterov": _sgd(momentum=0.8, nesterov=True, weight_decay=0.1, maximize=True),
    "sgd nesterov first": _sgd(momentum=0.8, nesterov=True, first=True),
    "sgd scaled": _sgd(momentum=0.9, grad_scale=one(3.0), found_inf=one(0.0)),
    "sgd scaled maximize": _sgd(grad_scale=one(8.0), maximize=True),
    "sgd found_inf": _sgd(momentum=0.9, grad_scale=one(8.0), found_inf=one(1.0)),
    "sgd tensor lr": _sgd(momentum=0.9, lr=one(0.05)),
    "sgd lr 0": _sgd(momentum=0.9, weight_decay=0.1, lr=0.0),
    "sgd tensor lr 0": _sgd(momentum=0.9, weight_decay=0.1, lr=one(0.0)),
    "adam": _adam(),
    "adam decay maximize": _adam(weight_decay=0.1, maximize=True),
    "adamw": _adam(weight_decay=0.1, decoupled=True),
    "adamw amsgrad": _adam(weight_decay=0.1, decoupled=True, amsgrad=True),
    "adam amsgrad maximize": _adam(amsgrad=True, maximize=True),
    "adam beta1 below a half": _adam(beta1=0.3, beta2=0.95, eps=1e-3),
    "adam scaled": _adam(grad_scale=one(3.0), found_inf=one(0.0)),
    "adamw scaled": _adam(decoupled=True, weight_decay=0.1, grad_scale=one(3.0), maximize=True),
    "adamw found_inf": _adam(decoupled=True, grad_scale=one(8.0), found_inf=one(1.0)),
    "adamw tensor lr": _adam(decoupled=True, weight_decay=0.1, lr=torch.tensor([0.01])),
    "adamw lr 0": _adam(decoupled=True, weight_decay=0.1, lr=0.0),
    "adam tensor lr 0": _adam(weight_decay=0.1, lr=one(0.0)),
    "statistics": Op("row_statistics_", ("params", "grads"), {}),
    "mask": Op("row_mask_", ("params",), {"lr": 0.1}),
    "mask tensor lr": Op("row_mask_", ("params",), {"lr": one(0.1)}),
    "mask lr 0": Op("row_mask_", ("params",), {"lr": 0.0}),
}
