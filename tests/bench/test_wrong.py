"""A case with a wrong result is never timed, whichever part of the result is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench.small import DTYPES, case, suite
from torch import Tensor

from sparsekern.bench import check, iteration
from sparsekern.bench.cases import Case
from sparsekern.bench.comparisons import OPS, build, candidates
from sparsekern.bench.problem import Problem
from sparsekern.bench.suite import ABSENT, TIMED, WRONG
from sparsekern.kernels import ops as _ops
from sparsekern.kernels.backends import cpu, reference
from sparsekern.kernels.rows import DOT, Rows
from sparsekern.optim import AdamW

NORMS = ("norm_act", "norm_act_backward")
STEPS = [op for op in OPS if op not in ("row_statistics_", "row_mask_", "channel_moments_", *NORMS)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("masked", [0.0, 0.5])
def test_right_results_are_timed(small: str, op: str, masked: float) -> None:
    result = suite(placements=2).result(case(op, masked=masked))
    assert (result.status, result.reason) == (TIMED, None)
    assert tuple(result.seconds) == candidates(result.case)
    assert tuple(result.over) == candidates(result.case)[1:]
    assert all(0 < spread.q1 <= spread.median <= spread.q3 for spread in result.seconds.values())
    assert (result.share_of_stream is None) == op.endswith("iteration")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [None, 0.0])
@pytest.mark.parametrize("op", ["adam_step_", "sgd_step_", "adamw-step"])
def test_right_in_every_dtype_with_and_without_rows(
    small: str, op: str, masked: float | None, dtype: torch.dtype
) -> None:
    with check.forced("cpu"):
        assert build(case(op, dtype=dtype, masked=masked)).validate() is None


def broken(name: str, spoil: Callable[..., None], calls: list[str]) -> Callable[..., None]:
    """The CPU backend's function, whose result is then spoilt."""
    right = getattr(cpu, name)

    def function(*tensors: Any, **options: Any) -> None:
        calls.append(name)
        right(*tensors, **options)
        spoil(*tensors, **options)

    return function


def spoil_last_bit(params: list[Tensor], *_: Any, **__: Any) -> None:
    last = params[-1].data.view(-1)[-1:]
    last.copy_(torch.nextafter(last, last + 1))


def spoil_state(params: list[Tensor], grads: list[Tensor], state: list[Tensor], *_: Any, **__: Any) -> None:
    state[0].view(-1)[0] *= 1.001


def spoil_count(*_: Any, rows: Rows, **__: Any) -> None:
    rows.table.sums[3, 0] += 1


def spoil_dot(*_: Any, rows: Rows, **__: Any) -> None:
    rows.table.sums[:, DOT] *= 1.01


def spoil_threshold(*_: Any, rows: Rows, **__: Any) -> None:
    rows.table.threshold[2] *= 1.01


def spoil_countdown(*_: Any, rows: Rows, **__: Any) -> None:
    rows.table.countdown[0] += 1


def raise_error(*_: Any, **__: Any) -> None:
    raise RuntimeError("no such instruction")


SPOILT: dict[str, tuple[Callable[..., None], tuple[str, ...], str]] = {
    "last bit": (spoil_last_bit, ("adam_step_", "sgd_step_", "row_mask_"), "parameter 9 "),
    "state": (spoil_state, ("adam_step_", "sgd_step_"), " 0 "),
    "count": (spoil_count, ("adam_step_", "sgd_step_", "row_statistics_"), "sums[:, 0]"),
    "dot": (spoil_dot, ("adam_step_", "sgd_step_", "row_statistics_"), "sums[:, 1]"),
    "threshold": (spoil_threshold, ("adam_step_", "sgd_step_", "row_statistics_"), "threshold"),
    "countdown": (spoil_countdown, ("adam_step_", "sgd_step_", "row_mask_"), "countdown"),
    "error": (
        raise_error,
        ("adam_step_", "sgd_step_", "row_statistics_", "row_mask_"),
        "RuntimeError: no such",
    ),
}


@pytest.mark.parametrize(("what", "op"), [(what, op) for what, (_, ops, _) in SPOILT.items() for op in ops])
def test_a_broken_op_is_reported_and_not_timed(
    small: str, monkeypatch: pytest.MonkeyPatch, what: str, op: str
) -> None:
    spoil, _, text = SPOILT[what]
    calls: list[str] = []
    monkeypatch.setattr(cpu, op, broken(op, spoil, calls))
    result = suite().result(case(op))
    assert result.status == WRONG
    assert text in str(result.reason)
    assert calls == [op]
    assert not result.seconds and not result.over and not result.gb_per_s


@pytest.mark.parametrize("op", STEPS)
def test_whole_steps_and_iterations_find_a_broken_op(
    small: str, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    name = {"sgd": "sgd_step_", "hooks": "row_mask_"}.get(
        op.partition("-")[0].partition("_")[0], "adam_step_"
    )
    calls: list[str] = []
    monkeypatch.setattr(cpu, name, broken(name, spoil_last_bit, calls))
    result = suite().result(case(op))
    assert result.status == WRONG
    assert re.match(r"parameter \d .*: 1 of", str(result.reason))
    assert calls == [name]


@pytest.mark.parametrize("op", NORMS)
def test_a_broken_normalisation(small: str, monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    def spoilt(*operands: Any, **options: Any) -> tuple[Tensor, ...]:
        found = right(*operands, **options)
        found[0].view(-1)[3] += 0.01
        return found

    name = {"norm_act": "norm_act_forward", "norm_act_backward": "norm_act_backward"}[op]
    right = getattr(cpu, name)
    monkeypatch.setattr(cpu, name, spoilt)
    result = suite().result(case(op))
    assert result.status == WRONG
    assert f"{'y' if op == 'norm_act' else 'gradient of x'}: 1 of 420" in str(result.reason)
    assert not result.seconds


def test_broken_moments(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(table: Any) -> None:
        right(table)
        table.channel_dot[1] *= 1.01

    right = cpu.channel_moments_
    monkeypatch.setattr(cpu, "channel_moments_", spoilt)
    for op in ("channel_moments_", "adamw-step"):
        result = suite().result(case(op))
        assert result.status == WRONG and "channel_dot: 1 of" in str(result.reason)


def test_an_iteration_finds_wrong_gradients(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = iteration.Training.backward

    def spoilt(training: iteration.Training) -> Tensor:
        loss = right(training)
        if isinstance(training.optimizer, AdamW):
            training.model.first.weight.grad.mul_(1.01)
        return loss

    monkeypatch.setattr(iteration.Training, "backward", spoilt)
    result = suite().result(case("adamw-iteration"))
    assert result.status == WRONG and "gradient of first.weight" in str(result.reason)


def test_sums_may_be_off_by_the_order_of_their_terms(small: str) -> None:
    problems = [Problem.of(case("adam_step_"), AdamW) for _ in range(2)]
    for problem in problems:
        table = problem.table
        assert table is not None
        reference.row_statistics_(problem.params, problem.grads, rows=table.rows_of(problem.params))
    assert problems[0].table is not None
    problems[0].table.sums[:, 1:] *= 1 + 2e-7
    assert check.difference(*problems) is None
    problems[0].table.sums[0, 2] *= 1 + 1e-4
    assert "sums[:, 2]: 1 of" in str(check.difference(*problems))


def test_a_backend_that_does_not_work_here_is_left_out(small: str) -> None:
    if torch.cuda.is_available():
        return
    result = suite().result(Case("adam_step_", small, "cuda"))
    assert result.status == ABSENT and "CUDA" in str(result.reason)


def test_the_backend_is_forced_and_forgotten(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(cpu, "adam_step_", broken("adam_step_", raise_error, calls))
    result = suite().result(case("adam_step_", backend="reference"))
    assert result.status == TIMED and not calls
    problem = Problem.of(case("adam_step_"), AdamW)
    with pytest.raises(RuntimeError, match="no such instruction"):
        problem.optimizer.step()
    assert _ops.choose(torch.device("cpu")) is cpu
