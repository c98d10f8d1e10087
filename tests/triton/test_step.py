"""The Triton kernels of the steps, interpreted, equal the reference: results, state and every side effect."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kernels.tolerance import assert_equal_step

import sparsekern
from sparsekern.kernels import backends, native
from sparsekern.kernels.backends import reference, triton
from sparsekern.kernels.backends.triton import plan as _plan
from sparsekern.kernels.backends.triton import step as steps
from sparsekern.kernels.backends.triton.step_kernels import VARIANTS
from sparsekern.kernels.backends.triton.table import NUMBERS
from sparsekern.kernels.rows import RowTable
from sparsekern.kernels.selfcheck.calls import OPS, Op
from sparsekern.kernels.selfcheck.cases import first_use_of_triton
from sparsekern.kernels.selfcheck.problems import Problem, channel_arrays, problem
from sparsekern.kernels.selfcheck.run import results

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Every loop over a tensor, with and without a remainder of elements.
SHAPES = (
    ((17,), 0),
    ((3, 1, 3, 3), 0),
    ((70, 8, 2, 2), 0),
    ((7, 5), None),
    ((17, 33), 0),
    ((6, 4, 4, 4), 0),
    ((3, 48, 3, 3), 0),
    ((3, 301), 0),
    ((5, 3, 2, 2), 1),
    ((2, 17, 33), 1),
    ((9, 40, 2, 2), 1),
    ((2, 3, 4), 2),
    ((), None),
    ((0, 3, 3, 3), 0),
)

# Rows in pieces of inner elements and of outer indices, several groups of rows for a program.
LARGE = (
    ((2, 16400), 0),
    ((2, 20011), 0),
    ((30001,), None),
    ((600, 9), 0),
    ((200, 40, 2, 2), 1),
    ((2, 3, 17000), 1),
    ((70, 1024), 0),
)

Plans = dict[bytes, Any]

OTHER_DTYPES = (torch.float64, torch.bfloat16, torch.float16)


def _compare(op: Op, want: Problem, steps: int = 1) -> None:
    """Both start each step from the same state, so differences do not accumulate."""
    got = want.clone()
    for _ in range(steps):
        before = want.clone()
        op.call(reference, want)
        op.call(triton, got)
        assert_equal_step(got, want, before)
        got.copy_(want)


def _problem(dtype: torch.dtype = torch.float32, layout: str = "contiguous", **options: Any) -> Problem:
    row_state = options.pop("row_state", "some masked, some fading")
    return problem(dtype, layout, row_state, **{"shapes": SHAPES, **options})


@pytest.mark.parametrize("name", OPS)
def test_op(name: str) -> None:
    _compare(OPS[name], _problem(seed=1))


@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["sgd nesterov", "adam amsgrad maximize", "adamw scaled", "statistics", "mask"]
)
def test_dtype(name: str, dtype: torch.dtype) -> None:
    _compare(OPS[name], _problem(dtype, seed=2))


@pytest.mark.parametrize("layout", ["channels_last", "contiguous gradients", "permuted", "all with holes"])
@pytest.mark.parametrize("name", ["sgd scaled", "statistics", "mask"])
def test_layout(name: str, layout: str) -> None:
    _compare(OPS[name], _problem(layout=layout, seed=3))


@pytest.mark.parametrize("row_state", ["all live", "all fading", "all masked"])
@pytest.mark.parametrize("name", ["adamw", "mask"])
def test_row_state(name: str, row_state: str) -> None:
    _compare(OPS[name], _problem(torch.bfloat16, row_state=row_state, seed=4), steps=2)


@pytest.mark.parametrize("name", ["sgd momentum", "adamw amsgrad", "statistics"])
def test_spoilt_gradients(name: str) -> None:
    want = _problem(seed=5)
    for guarded, spoiler in zip(want.tensors["grads"], 5 * [float("nan"), float("inf"), 1e30], strict=False):
        if guarded.view.numel() > 4:
            guarded.view.view(-1)[[1, -2]] = spoiler
    _compare(OPS[name], want)


@pytest.mark.parametrize("name", ["sgd momentum", "adam decay maximize", "statistics"])
def test_list_without_rows(name: str) -> None:
    want = _problem(seed=6)
    want.starts = [-1] * len(want.starts)
    _compare(OPS[name], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["adamw scaled", "statistics", "mask"])
def test_large(name: str, dtype: torch.dtype) -> None:
    _compare(OPS[name], _problem(dtype, shapes=LARGE, seed=7))


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Plans:
    """Those of the test alone."""
    monkeypatch.setattr(steps._steps, "plans", {})
    return steps._steps.plans


def test_accesses_are_wide_where_addresses_are_aligned(plans: Plans) -> None:
    found = []
    for guard in (64, 63):
        shapes = (((3, 512, 3, 3), 0), ((6, 4, 4, 4), 0))
        _compare(OPS["adamw"], _problem(shapes=shapes, seed=8, guard=guard))
        *_, plan = plans.values()
        found.append([VARIANTS.value[i][3] for i in plan.table[-2:].tolist()])
    assert found == [[True, True], [False, False]]


def test_the_device_is_told_what_has_changed(plans: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    want, sent = _problem(shapes=SHAPES[:3]), []
    words = _plan.Plan._words
    monkeypatch.setattr(_plan.Plan, "_words", lambda *given: sent.append(1) or words(*given))
    op = OPS["sgd"]

    def made(count: int, **options: Any) -> bool:
        sent.clear()
        Op(op.name, op.lists, op.options | options).call(triton, want)
        return len(sent) == count

    assert made(1)
    assert made(0)
    assert made(1, lr=0.3) and made(0, lr=0.3)
    assert made(1, lr=torch.tensor(0.3)) and made(0, lr=torch.tensor(0.4))
    want.tensors["grads"][0] = want.tensors["grads"][0].clone()
    assert made(1, lr=torch.tensor(0.3))
    want.tau *= 2
    assert made(1, lr=torch.tensor(0.3))


def test_a_captured_graph_has_its_own_table(plans: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    want, op = _problem(shapes=SHAPES[:3]), OPS["sgd"]
    op.call(triton, want)
    (plan,) = plans.values()
    before, spares = plan.table, list(plan.spares)
    monkeypatch.setattr(_plan, "_is_capturing", lambda device: True)
    op.call(triton, want)
    host, table, scratch, shapes, owners = _plan.captured.pop()
    assert shapes is plan.shapes and owners is plan.owners
    assert host is spares[-1] and torch.equal(host, table)
    assert table is not before and table[1 + len(NUMBERS)] == scratch.data_ptr()
    assert plan.table is before and len(plan.spares) == len(spares) - 1


def test_the_self_check_passes() -> None:
    """Every fifth of its problems; all take 12 s in the interpreter."""
    chosen = itertools.islice(first_use_of_triton(), 0, None, 5)
    found = [result.failure for result in results(triton, torch.device("cpu"), chosen)]
    assert len(found) >= 9 and set(found) == {None}


def test_captures_in_a_row_pin_no_memory(plans: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    want, op = _problem(shapes=SHAPES[:3]), OPS["sgd"]
    op.call(triton, want)
    (plan,) = plans.values()
    capturing = [True]
    monkeypatch.setattr(_plan, "captured", [])
    monkeypatch.setattr(_plan, "_is_capturing", lambda device: capturing[0])
    pinned = _plan.Plan._pinned

    def only_outside(self: Any) -> torch.Tensor:
        if capturing[0]:
            raise RuntimeError("operation not permitted when stream is capturing")
        return pinned(self)

    monkeypatch.setattr(_plan.Plan, "_pinned", only_outside)
    for _ in range(4):
        op.call(triton, want)
    hosts = [entry[0].data_ptr() for entry in _plan.captured]
    assert len(set(hosts)) == 4
    with pytest.raises(
        RuntimeError, match="^optimizer: got a step in the capture of a CUDA graph without pinned"
    ):
        op.call(triton, want)
    capturing[0] = False
    op.call(triton, want)
    # The content has not changed, so nothing was sent; a new learning rate is.
    Op(op.name, op.lists, op.options | {"lr": 0.5}).call(triton, want)
    assert len(plan.spares) == 4


@pytest.mark.parametrize("pending", [0.0, 1.0])
@pytest.mark.parametrize("channels", [0, 7, 700])
def test_channel_moments(channels: int, pending: float) -> None:
    """Rows that are gates of several channels, in several programs; twice, for what is left between calls."""
    want, got = (channel_arrays(channels, pending) for _ in range(2))
    for _ in range(2):
        reference.channel_moments_(want)
        triton.channel_moments_(got)
        torch.testing.assert_close(got[:-1], want[:-1], rtol=1e-6, atol=1e-6)


def test_an_optimizer_steps_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Early and late steps through the optimizer and the checks of the ops, as in training."""
    results = []
    for name in ("reference", "triton"):
        monkeypatch.setenv("SPARSEKERN_BACKEND", name)
        backends.reset()
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 20, 3), torch.nn.BatchNorm2d(20), torch.nn.Flatten())
        optimizer = sparsekern.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2), amsgrad=True)
        table = RowTable([(param, 0) for param in model.parameters()], [[20, 40], [21, 41]])
        optimizer.attach(table)
        table.countdown[:5] = 3
        for turn in range(4):
            optimizer.zero_grad()
            model(torch.randn(2, 3, 8, 8)).square().mean().backward()
            optimizer.step()
            if turn == 2:
                for state in optimizer.state.values():
                    state["step"].fill_(12345)
        assert (table.countdown[:5] == 0).all()
        results.append([*model.parameters(), table.activity, table.channel_dot])
    monkeypatch.undo()
    backends.reset()
    for mine, theirs in zip(results[1][:-2], results[0][:-2], strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(results[1][-2:], results[0][-2:], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_addresses_read_in_python(plans: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no compiler."""
    direct = _problem(layout="channels_last")
    around = direct.clone()
    OPS["adamw amsgrad"].call(triton, direct)
    monkeypatch.setattr(native, "exchanges", False)
    OPS["adamw amsgrad"].call(triton, around)
    for mine, other in zip(direct.entries().values(), around.entries().values(), strict=True):
        assert torch.equal(mine.buffer.nan_to_num(7), other.buffer.nan_to_num(7))
