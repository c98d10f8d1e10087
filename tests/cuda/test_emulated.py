"""The CUDA kernels, emulated, equal the reference: results, state and every side effect."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import pytest
import torch
from kernels.tolerance import assert_equal_step

import sparsekern
from sparsekern.kernels import native
from sparsekern.kernels import ops as _ops
from sparsekern.kernels.backends import reference
from sparsekern.kernels.backends.addresses import Addresses
from sparsekern.kernels.backends.cuda import step as cuda_step
from sparsekern.kernels.native import cuda_library
from sparsekern.kernels.rows import RowTable
from sparsekern.kernels.selfcheck.calls import ADAM, OPS, SGD, Op, run_op
from sparsekern.kernels.selfcheck.cases import first_use
from sparsekern.kernels.selfcheck.problems import (
    DTYPES,
    GUARD,
    LARGE,
    LAYOUTS,
    ROW_STATES,
    SHAPES,
    Guarded,
    Problem,
    channel_arrays,
    problem,
)
from sparsekern.kernels.selfcheck.run import results


def _call(backend: Any, op: Op, on: Problem) -> None:
    op.call(backend, on)


def _compare(backend: Any, op: Op, want: Problem, steps: int) -> None:
    """Both start each step from the same state, so differences do not accumulate."""
    got = want.clone()
    for _ in range(steps):
        before = want.clone()
        _call(reference, op, want)
        _call(backend, op, got)
        assert_equal_step(got, want, before)
        got.copy_(want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_op(emulated: Any, name: str, dtype: torch.dtype) -> None:
    want = problem(dtype, "contiguous", "some masked, some fading", seed=1)
    _compare(emulated, OPS[name], want, steps=2)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("name", ["sgd momentum", "adamw scaled", "statistics", "mask"])
def test_layout(emulated: Any, name: str, layout: str) -> None:
    want = problem(torch.float32, layout, "some masked, some fading", seed=2)
    _compare(emulated, OPS[name], want, steps=1)


@pytest.mark.parametrize("row_state", ROW_STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sgd nesterov", "adam decay maximize", "statistics", "mask"])
def test_row_state(emulated: Any, name: str, dtype: torch.dtype, row_state: str) -> None:
    _compare(emulated, OPS[name], problem(dtype, "channels_last", row_state, seed=3), steps=3)


@pytest.mark.parametrize("name", ["sgd momentum", "adamw amsgrad", "statistics"])
@pytest.mark.parametrize("spoiler", [float("nan"), float("inf"), 1e30])
def test_spoilt_gradients(emulated: Any, name: str, spoiler: float) -> None:
    want = problem(torch.float32, "contiguous", "some masked, some fading", seed=4)
    for guarded in want.tensors["grads"]:
        if guarded.view.numel() > 4:
            guarded.view.view(-1)[[1, -2]] = spoiler
    _compare(emulated, OPS[name], want, steps=2)


@pytest.mark.parametrize("name", ["sgd momentum", "adamw amsgrad", "statistics"])
def test_list_without_rows(emulated: Any, name: str) -> None:
    want = problem(torch.float32, "contiguous", "some masked, some fading", seed=6)
    want.starts = [-1] * len(want.starts)
    _compare(emulated, OPS[name], want, steps=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sgd scaled maximize", "adamw scaled", "statistics", "mask"])
def test_large(emulated: Any, name: str, dtype: torch.dtype) -> None:
    want = problem(dtype, "contiguous", "some masked, some fading", seed=7, shapes=LARGE)
    _compare(emulated, OPS[name], want, steps=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["sgd momentum", "adamw amsgrad", "mask"])
def test_addresses_that_are_not_aligned(emulated: Any, name: str, dtype: torch.dtype) -> None:
    """Element by element; an access of sixteen bytes would be an error of the emulation."""
    want = problem(dtype, "contiguous", "some masked, some fading", seed=8, guard=GUARD - 1)
    _compare(emulated, OPS[name], want, steps=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["sgd momentum", "adamw scaled", "statistics"])
def test_gradients_alone_are_not_aligned(emulated: Any, name: str, dtype: torch.dtype) -> None:
    """As views of a bucket are; the bits are those of aligned gradients, as all else is processed alike."""
    aligned = problem(dtype, "contiguous", "some masked, some fading", seed=8, shapes=(*SHAPES, *LARGE))
    shifted = aligned.clone()
    shifted.tensors["grads"] = [Guarded.of(g.view, guard=GUARD - 1) for g in aligned.tensors["grads"]]
    assert any(g.view.data_ptr() % 16 for g in shifted.tensors["grads"])
    before, want = shifted.clone(), shifted.clone()
    OPS[name].call(emulated, aligned)
    OPS[name].call(emulated, shifted)
    OPS[name].call(reference, want)
    assert_equal_step(shifted, want, before)
    for (what, one), two in zip(aligned.entries().items(), shifted.entries().values(), strict=True):
        assert torch.equal(one.view.nan_to_num(7), two.view.nan_to_num(7)), what


@pytest.mark.parametrize("name", ["sgd momentum", "adamw", "statistics"])
def test_a_list_with_the_large_table_of_arguments(emulated: Any, name: str) -> None:
    """More tensors than the arguments of 4 KB hold; all other lists of problems are shorter."""
    shapes = (*SHAPES, *SHAPES, *SHAPES, *SHAPES)
    assert len(shapes) > 32 > len(SHAPES)
    want = problem(torch.float32, "contiguous", "some masked, some fading", seed=10, shapes=shapes)
    _compare(emulated, OPS[name], want, steps=1)


@pytest.mark.parametrize("shapes", [SHAPES, LARGE], ids=["small", "large"])
def test_sums_that_are_not_aligned(emulated: Any, shapes: Any) -> None:
    """Number by number; an access of sixteen bytes would be an error of the emulation."""
    want = problem(torch.float32, "contiguous", "some masked, some fading", seed=11, shapes=shapes)
    want.arrays["sums"] = Guarded.of(want.arrays["sums"].view, guard=GUARD - 1)
    assert want.arrays["sums"].view.data_ptr() % 16 == 4 * (GUARD - 1) % 16
    _compare(emulated, OPS["statistics"], want, steps=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("step", [0, 1, 10, 1000, 100_000])
def test_bias_corrections_of_early_and_late_steps(emulated: Any, step: int, dtype: torch.dtype) -> None:
    want = problem(dtype, "contiguous", "all live", seed=12)
    for guarded in want.tensors["steps"]:
        guarded.view.fill_(step)
    _compare(emulated, OPS["adamw"], want, steps=1)


@pytest.mark.parametrize("name", ["sgd nesterov", "adamw", "statistics", "mask"])
@pytest.mark.parametrize("shapes", [SHAPES, LARGE], ids=["small", "large"])
def test_no_order_of_blocks_and_threads_changes_a_bit(
    emulated: Any, emulated_library: ctypes.CDLL, name: str, shapes: Any
) -> None:
    start = problem(torch.float32, "contiguous", "some masked, some fading", seed=9, shapes=shapes)
    results = []
    for order, starve in ((0, False), (1, False), (2, False), (0, True), (1, True)):
        emulated_library.emulation_order(order, starve)
        got = start.clone()
        _call(emulated, OPS[name], got)
        results.append(got)
    for other in results[1:]:
        for (what, one), two in zip(results[0].entries().items(), other.entries().values(), strict=True):
            assert torch.equal(one.buffer.view(torch.uint8), two.buffer.view(torch.uint8)), what


@pytest.mark.parametrize("pending", [0.0, 1.0])
@pytest.mark.parametrize("channels", [0, 7, 700])
@pytest.mark.parametrize("order", [0, 1])
def test_channel_moments(
    emulated: Any, emulated_library: ctypes.CDLL, channels: int, pending: float, order: int
) -> None:
    """Rows that are gates of several channels, in several blocks; twice, for what is left between calls."""
    emulated_library.emulation_order(order, False)
    want, got = (channel_arrays(channels, pending) for _ in range(2))
    for _ in range(2):
        reference.channel_moments_(want)
        emulated.channel_moments_(got)
        torch.testing.assert_close(got[:-1], want[:-1], rtol=1e-6, atol=1e-6)


def test_counters_of_channel_moments_are_made_outside_of_captures(
    emulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a capture fills is not filled until the replay, so a later launch may not find that memory."""
    monkeypatch.setattr(cuda_step, "_tickets", {})
    zeros, capturing = torch.zeros, [False]
    monkeypatch.setattr(cuda_library, "capturing", lambda: capturing[0])
    monkeypatch.setattr(
        torch, "zeros", lambda *a, **k: zeros(*a, **k).fill_(77) if capturing[0] else zeros(*a, **k)
    )
    want, got = (channel_arrays(700, 1.0) for _ in range(2))
    for step in range(4):
        capturing[0] = step in (1, 2)
        monkeypatch.setattr(cuda_library, "stream", lambda device, step=step: step)
        reference.channel_moments_(want)
        emulated.channel_moments_(got)
        torch.testing.assert_close(got[:-1], want[:-1], rtol=1e-6, atol=1e-6)
    assert len(cuda_step._tickets) == 1
    capturing[0] = True
    emulated.channel_moments_(channel_arrays(7, 1.0))
    assert len(cuda_step._tickets) == 1


def _lists(count: int) -> tuple[list[Any], list[torch.Tensor]]:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(count)]
    return params, [torch.ones(3) for _ in range(count)]


@pytest.mark.parametrize(("count", "launches"), [(1, 1), (250, 1), (600, 3)])
def test_one_launch_takes_hundreds_of_tensors(emulated: Any, count: int, launches: int) -> None:
    params, grads = _lists(count)
    options = ADAM | {"lr": 0.1}
    states = [[torch.zeros(3) for _ in params] for _ in range(2)]
    steps = [torch.zeros(()) for _ in params]
    before = cuda_step._target.library.sparsekern_cuda_launches()
    run_op(emulated, "adam_step_", params, grads, *states, [], steps, **options, rows=None)
    # The step, and what follows it.
    assert cuda_step._target.library.sparsekern_cuda_launches() - before == 2 * launches
    for param, step in zip(params, steps, strict=True):
        torch.testing.assert_close(param.detach(), torch.full((3,), 0.9))
        assert step == 1
    run_op(emulated, "sgd_step_", params, grads, [], **SGD, rows=None)
    # Nothing follows a step that neither counts steps nor has rows.
    assert cuda_step._target.library.sparsekern_cuda_launches() - before == 3 * launches


def test_an_optimizer_steps_on_it(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step through the optimizer and the checks of the ops, as in training."""
    results = []
    for backend in (reference, emulated):
        monkeypatch.setattr(_ops, "choose", lambda device, backend=backend: backend)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 20, 3), torch.nn.BatchNorm2d(20), torch.nn.Flatten())
        optimizer = sparsekern.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2), amsgrad=True)
        table = RowTable([(param, 0) for param in model.parameters()], [[20, 40], [21, 41]])
        optimizer.attach(table)
        table.countdown[:5] = 3
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(2, 3, 8, 8)).square().mean().backward()
            optimizer.step()
        assert (table.countdown[:5] == 0).all()
        results.append([*model.parameters(), table.activity, table.channel_dot])
    for mine, theirs in zip(results[1][:-2], results[0][:-2], strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(results[1][-2:], results[0][-2:], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_addresses_read_in_python(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["adamw amsgrad"]
    direct = problem(torch.float32, "channels_last", "some masked, some fading")
    around = direct.clone()
    _call(emulated, op, direct)
    monkeypatch.setattr(native, "exchanges", False)
    _call(emulated, op, around)
    for mine, other in zip(direct.entries().values(), around.entries().values(), strict=True):
        assert torch.equal(mine.buffer.nan_to_num(7), other.buffer.nan_to_num(7))


def test_the_self_check_passes_and_takes_seconds(emulated: Any) -> None:
    """The problems of the first use on a GPU; the time is this process's own."""
    start = time.process_time()
    device = torch.device("cpu")
    failures = [result.failure for result in results(emulated, device, first_use())]
    assert time.process_time() - start < 5
    assert len(failures) > 200 and set(failures) == {None}


def test_null_is_refused(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params, grads = _lists(3)
    read = Addresses.read

    def without_grads(*arguments: Any) -> bytes:
        found = bytearray(read(*arguments) or b"")
        found[8 * 4 : 8 * 5] = bytes(8)
        return bytes(found)

    monkeypatch.setattr(Addresses, "read", without_grads)
    with pytest.raises(RuntimeError, match=r"a list of 3 tensors: an address is missing \(error 1\)"):
        run_op(emulated, "sgd_step_", params, grads, [], **SGD, rows=None)
    assert all(torch.equal(param, torch.ones(3)) for param in params)


def test_scratch_of_a_captured_graph_is_kept(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another stream gets its own scratch; without both, nothing is allocated after the first step."""
    want = problem(torch.float32, "contiguous", "all live", shapes=LARGE)
    op = OPS["sgd"]
    _call(emulated, op, want)
    (plan,) = cuda_step._steps.plans.values()
    scratch = plan.scratch
    _call(emulated, op, want)
    assert plan.scratch is scratch
    monkeypatch.setattr(cuda_step, "_captured", [])
    monkeypatch.setattr(cuda_library, "capturing", lambda: True)
    monkeypatch.setattr(cuda_library, "stream", lambda device: 5)
    for _ in range(2):
        _call(emulated, op, want)
    assert plan.scratch is not scratch
    assert len(cuda_step._captured) == 1 and cuda_step._captured[0] is plan.scratch
