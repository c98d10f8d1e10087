"""The reference itself: against the definitions element by element, and against torch's steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from kernels import oracle
from torch import Tensor
from torch.nn import Parameter

from sparsekern.kernels.backends import reference
from sparsekern.kernels.rows import LIVE, Rows, RowTable
from sparsekern.kernels.selfcheck.calls import ADAM, OPS, SGD, Op, run_op

# Rows in every state, and whether the gradient of each contains a NaN.
COUNTDOWNS = [LIVE, 0, 1, LIVE, 2, 0, LIVE, 5]
WITH_NAN = [False, True, False, True, False, False, False, False]
SETTINGS = [name for name, op in OPS.items() if op.name in ("sgd_step_", "adam_step_")]


def _values(options: dict[str, Any]) -> dict[str, Any]:
    """The options with tensors as Python numbers, as given (not rounded to float32)."""
    return {
        name: round(value.item(), 6) if isinstance(value, Tensor) else value
        for name, value in options.items()
    }


def _lists(tensor: Tensor, dim: int) -> list[list[float]]:
    return tensor.detach().movedim(dim, 0).flatten(1).tolist()


class _TrackedTensor:
    """One tensor with rows and state, as tensors and as the oracle's rows."""

    def __init__(self, dim: int, op: Op) -> None:
        generator = torch.Generator().manual_seed(11)
        shape = (8, 5, 2) if dim == 0 else (3, 8, 2)

        def randn() -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.dim = dim
        self.op = op
        self.table = RowTable([(Parameter(randn()), dim)], [], tau=0.9, decay=0.75)
        self.param = self.table.views[0].param
        table = self.table
        table.countdown.copy_(torch.tensor(COUNTDOWNS))
        table.penalty.copy_(torch.tensor([0, 0, 0.25, 0.5, 0.125, 0, 0, 1]))
        table.threshold.copy_(torch.tensor([0.5, 1, 0.25, 0.5, 1, float("inf"), 0, 0.75]))
        table.activity.copy_(torch.arange(8) / 8)
        self.grad = randn()
        self.grad.movedim(dim, 0)[torch.tensor(WITH_NAN), 1] = float("nan")
        self.step = torch.tensor(2.0)
        names = [name for name in op.lists if name not in ("params", "grads", "steps", "")]
        self.state = {name: randn().abs() for name in names}
        table.zero_masked(lambda param: self.state.values())
        states = {name: _lists(tensor, dim) for name, tensor in self.state.items()}
        self.rows = [
            oracle.Row(
                w,
                d,
                {name: rows[r] for name, rows in states.items()},
                *(array[r].item() for array in (table.penalty, table.countdown)),
                *(array[r].item() for array in (table.threshold, table.activity)),
            )
            for r, (w, d) in enumerate(zip(_lists(self.param, dim), _lists(self.grad, dim), strict=True))
        ]

    def call(self) -> None:
        lists = {"params": [self.param], "grads": [self.grad], "steps": [self.step], "": []}
        lists |= {name: [tensor] for name, tensor in self.state.items()}
        rows = self.table.rows_of([self.param])
        run_op(reference, self.op.name, *map(lists.get, self.op.lists), **self.op.options, rows=rows)

    def assert_equal(self) -> None:
        pairs = {
            "param": (self.param.detach(), [row.w for row in self.rows]),
            "grad": (self.grad, [row.d for row in self.rows]),
        }
        for name, tensor in self.state.items():
            pairs[name] = (tensor, [row.state[name] for row in self.rows])
        for name, (tensor, rows) in pairs.items():
            got = torch.tensor(_lists(tensor, self.dim), dtype=torch.float64)
            torch.testing.assert_close(
                got,
                torch.tensor(rows, dtype=torch.float64),
                rtol=1e-12,
                atol=1e-13,
                equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )
        for name in ("countdown", "threshold", "activity", "sums"):
            array = getattr(self.table, name)
            want = torch.tensor([getattr(row, name) for row in self.rows], dtype=array.dtype)
            torch.testing.assert_close(array, want, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", SETTINGS)
def test_step_by_the_definitions(name: str, dim: int) -> None:
    tensor = _TrackedTensor(dim, OPS[name])
    options = _values(tensor.op.options)
    nonfinite = 0
    for made in (2, 3, 4):
        if "tensor lr" in name:
            # Float32 rounds the learning rate; the oracle gets the rounded one.
            options["lr"] = tensor.op.options["lr"].item()
        tensor.call()
        nonfinite += oracle.step(tensor.rows, made, options, tau=0.9, decay=0.75)
        tensor.assert_equal()
        if tensor.op.options["grad_scale"] is None:
            continue
        tensor.grad.copy_(torch.ones_like(tensor.grad))
        for row in tensor.rows:
            row.d = [1.0] * len(row.d)
    assert tensor.table.nonfinite.item() == nonfinite
    assert tensor.table.pending.item() == float("0" not in name and "inf" not in name)
    assert tensor.step.item() == (2.0 if "inf" in name or "sgd" in name else 5.0)


def test_statistics_and_mask_make_the_rest_of_a_step() -> None:
    """Around an external optimizer: the same statistics, then penalty and fade without its update."""
    tensor = _TrackedTensor(0, OPS["adamw"])
    rows = tensor.table.rows_of([tensor.param])
    before = tensor.param.detach().clone()
    run_op(reference, "row_statistics_", [tensor.param], [tensor.grad], rows=rows)
    assert torch.equal(tensor.param, before)
    live = [row for row in tensor.rows if row.countdown != 0]
    oracle.statistics(tensor.rows, live, [row.d for row in live], 0.9, 0.75)
    tensor.assert_equal()
    with torch.no_grad():
        tensor.param[1] = 3.0
    run_op(reference, "row_mask_", [tensor.param], lr=0.1, rows=rows)
    for row in live:
        row.w = [w * (1 - 0.1 * row.penalty) for w in row.w]
        oracle.fade(row)
    want = torch.tensor([row.w for row in tensor.rows], dtype=torch.float64)
    torch.testing.assert_close(tensor.param.detach().flatten(1), want, rtol=1e-13, atol=0)
    assert tensor.table.countdown.tolist() == [LIVE, 0, 0, LIVE, 1, 0, LIVE, 4]


@pytest.mark.parametrize("name", OPS)
def test_nothing_is_read_from_the_device(name: str) -> None:
    """Meta tensors have no values, so code that reads a value from the device raises here."""
    op = OPS[name]
    param = Parameter(torch.ones(4, 3, device="meta"))
    table = RowTable.__new__(RowTable)
    table._allocate(4, 2, param.device)
    table.tau, table.decay = 1.0, 0.5
    rows = Rows(table, [0], [0])
    lists = {"": [], "params": [param], "steps": [torch.ones((), device="meta")]}
    tensors = (lists.get(name, [torch.ones(4, 3, device="meta")]) for name in op.lists)
    options = {
        name: value.to("meta") if isinstance(value, Tensor) else value for name, value in op.options.items()
    }
    with pytest.raises(RuntimeError):
        bool(table.updates)
    run_op(reference, op.name, *tensors, **options, rows=rows)
    table.gate_offsets, table.gate_rows = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    reference.channel_moments_(table)


# Settings that torch has too, with the arguments of its kernels.
SGD_SETTINGS = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9, "dampening": 0.25, "weight_decay": 0.01},
    {"momentum": 0.9, "dampening": 0.25, "first": True},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "grad_scale": torch.tensor(3.0), "found_inf": torch.tensor(0.0)},
    {"momentum": 0.9, "grad_scale": torch.tensor(3.0), "found_inf": torch.tensor(1.0)},
]
ADAM_SETTINGS = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"weight_decay": 0.1, "decoupled": True},
    {"amsgrad": True},
    {"beta1": 0.25},
    {"grad_scale": torch.tensor(3.0), "found_inf": torch.tensor(0.0)},
    {"grad_scale": torch.tensor(3.0), "found_inf": torch.tensor(1.0), "decoupled": True},
]
# In units in the last place of the largest of an element's terms: its old and new value and the
# gradient that goes into it (times the rate, for a parameter). Torch contracts multiplications and additions.
ULPS = {torch.float32: 2, torch.float64: 2, torch.bfloat16: 1, torch.float16: 1}


def _assert_ulps(got: Tensor, want: Tensor, *terms: Tensor) -> None:
    size = torch.stack([term.double().abs() for term in (want, *terms)]).amax(0)
    allowed = ULPS[got.dtype] * torch.finfo(got.dtype).eps * size
    far = (got.double() - want.double()).abs() > allowed
    assert not far.any(), f"{int(far.sum())} of {far.numel()} elements"


def _draw(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]], count: int) -> list[list[Tensor]]:
    """Parameters, gradients, a mean of gradients, and means of their squares (not near 0)."""
    generator = torch.Generator().manual_seed(5)
    draws = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(count)]
    draws[3:] = [[0.1 + t.square() for t in tensors] for tensors in draws[3:]]
    return [[t.to(dtype) for t in tensors] for tensors in draws]


def _clone(lists: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[t.clone() for t in tensors] for tensors in lists]


def _assert_lists(
    ours: list[list[Tensor]], torchs: list[list[Tensor]], before: list[list[Tensor]], lr: float
) -> None:
    for place, lists in enumerate(zip(ours, torchs, before, strict=True)):
        for i, (mine, theirs, old) in enumerate(zip(*lists, strict=True)):
            _assert_ulps(mine, theirs, old, before[1][i] * (1 if place else lr))


@pytest.mark.parametrize("dtype", ULPS, ids=str)
@pytest.mark.parametrize("setting", SGD_SETTINGS, ids=lambda setting: " ".join(setting) or "plain")
def test_sgd_is_torchs(setting: dict[str, Any], dtype: torch.dtype) -> None:
    options = {**SGD, "lr": 0.05, **setting}
    # For 16-bit tensors the vector loop of torch 2.13's fused SGD drops the parameter and misreads the
    # momentum; its scalar loop for the remainder is right.
    wide = dtype in (torch.float32, torch.float64)
    before = _draw(dtype, [(1003,), (64, 3, 3, 3), (1,)] if wide else [(7,)] * 100, 3)
    ours, theirs = _clone(before), _clone(before)
    for lists in (ours, theirs):
        if options["momentum"] == 0:
            lists[2] = []
    run_op(reference, "sgd_step_", *ours, **options, rows=None)
    options["is_first_step"] = options.pop("first")
    torch._fused_sgd_(*theirs, **options)
    count = len(ours) - (options["momentum"] == 0)
    _assert_lists(ours[:count], theirs[:count], before[:count], options["lr"])


@pytest.mark.parametrize("dtype", ULPS, ids=str)
@pytest.mark.parametrize("setting", ADAM_SETTINGS, ids=lambda setting: " ".join(setting) or "plain")
def test_adam_is_torchs(setting: dict[str, Any], dtype: torch.dtype) -> None:
    options = {**ADAM, **setting}
    before = _draw(dtype, [(1003,), (64, 3, 3, 3), (1,)], 5 if options["amsgrad"] else 4)
    ours, theirs = _clone(before), _clone(before)
    no_top = [] if options["amsgrad"] else [[]]
    made = [0.0, 1.0, 20.0]
    steps = [torch.tensor(step) for step in made]
    run_op(reference, "adam_step_", *ours, *no_top, steps, **options, rows=None)
    rest = dict(options)
    fused = torch._fused_adamw_ if rest.pop("decoupled") else torch._fused_adam_
    # Torch increments the step count before its kernel, and decrements it on found_inf.
    fused(*theirs, *no_top, [torch.tensor(step + 1) for step in made], **rest)
    skipped = options["found_inf"] is not None and options["found_inf"].item() == 1
    assert [step.item() for step in steps] == [step + (not skipped) for step in made]
    _assert_lists(ours, theirs, before, options["lr"])
