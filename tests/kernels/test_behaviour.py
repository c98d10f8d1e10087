"""Properties of rows over several steps, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from sparsekern.kernels import backends
from sparsekern.kernels import ops as _ops
from sparsekern.kernels.rows import COUNT, DOT, LIVE, RowTable
from sparsekern.kernels.selfcheck.calls import ADAM, SGD, run_op

pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture(params=[name for name, works, _ in backends.available() if works])
def backend(request: pytest.FixtureRequest, force_backend: Callable[[str], None]) -> None:
    force_backend(request.param)


def _sgd(table: RowTable, grads: list[Tensor], **options: Any) -> None:
    params = [view.param for view in table.views]
    run_op(_ops, "sgd_step_", params, grads, [], **SGD | options, rows=table.rows_of(params))


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_counts_do_not_see_the_scale_of_a_filter_before_a_batch_norm() -> None:
    """The function is the same, the gradients are scaled inversely, and all of it exactly."""
    scales = 2.0 ** torch.arange(-6, 10).float()
    weight = _randn(16, 8, 3, 3) * torch.linspace(0.5, 2, 16).reshape(-1, 1, 1, 1)
    plain = RowTable([(Parameter(weight.clone()), 0)], [])
    scaled = RowTable([(Parameter(weight * scales.reshape(-1, 1, 1, 1)), 0)], [])
    for step in range(4):
        x, target = _randn(4, 8, 6, 6, seed=step), _randn(4, 16, 6, 6, seed=9 + step)
        for table in (plain, scaled):
            param = table.views[0].param
            out = F.conv2d(x, param, padding=1)
            # This epsilon vanishes beside every variance here; with a usual one the equality is not exact.
            out = F.batch_norm(out, None, None, training=True, eps=1e-30)
            (grad,) = torch.autograd.grad((F.relu(out) * target).sum(), param)
            run_op(_ops, "row_statistics_", [param], [grad], rows=table.rows_of([param]))
        assert torch.equal(scaled.sums[:, COUNT], plain.sums[:, COUNT])
        assert torch.equal(scaled.threshold, plain.threshold / scales)
    assert torch.equal(scaled.activity, plain.activity)
    counts = plain.sums[:, COUNT]
    assert counts.min() > 0 and counts.max() < 72 and counts.unique().numel() > 4


def test_a_filter_that_learns_less_is_counted_less() -> None:
    table = RowTable([(Parameter(torch.ones(3, 100)), 0)], [])
    for seed in range(3):
        gradient = _randn(3, 100, seed=seed) * torch.tensor([[1.0], [0.5], [0.1]])
        run_op(
            _ops,
            "row_statistics_",
            [table.views[0].param],
            [gradient],
            rows=table.rows_of([table.views[0].param]),
        )
    counts = table.sums[:, COUNT].tolist()
    assert counts[0] > 2 * counts[1] > 0 and counts[2] == 0


def test_no_threshold_before_the_first_step_and_none_for_an_empty_filter() -> None:
    weight = torch.ones(3, 5)
    weight[1] = 0
    table = RowTable([(Parameter(weight), 0)], [])
    _sgd(table, [_randn(3, 5)], lr=1e-9)
    assert not table.sums[:, COUNT].any() and not table.activity.any()
    assert table.threshold.isfinite().tolist() == [True, False, True]
    # Filters with nonzero weights only: the rms of |d| times the norm over all live ones.
    gradients = _randn(3, 5).square().sum(1)
    rms = (gradients[[0, 2]].sum() * 5 / (3 * 5)).sqrt()
    torch.testing.assert_close(table.threshold[[0, 2]], (rms / 5**0.5).expand(2))


def test_only_what_exceeds_the_threshold_counts() -> None:
    """A gradient equal to the threshold does not count, nor does a gradient of 0 with a threshold of 0."""
    param = Parameter(torch.ones(2, 4))
    table = RowTable([(param, 0)], [])
    table.threshold.copy_(torch.tensor([0.5, 0.0]))
    gradient = torch.tensor([[0.5, -0.5, 0.50001, -1.0], [0.0, 0.0, -0.0, 1e-30]])
    run_op(_ops, "row_statistics_", [param], [gradient], rows=table.rows_of([param]))
    assert table.sums[:, COUNT].tolist() == [2, 1]


def test_thresholds_without_any_gradient() -> None:
    """The threshold is 0 for a filter with weights, and stays infinite for one of zeros (not 0 / 0)."""
    param = Parameter(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    table = RowTable([(param, 0)], [])
    _sgd(table, [torch.zeros(2, 2)])
    assert table.threshold.tolist() == [0, float("inf")]


@pytest.mark.parametrize("kind", ["sgd", "adamw", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_fade_is_linear_to_an_exact_zero_and_stays_there(kind: str, dtype: torch.dtype) -> None:
    start = torch.tensor([1.0, -3.0, 0.37, 2.0]).to(dtype)
    table = RowTable([(Parameter(start.clone()), 0)], [])
    table.countdown.copy_(torch.tensor([5, 5, 3, LIVE], dtype=torch.int32))
    param = table.views[0].param
    rows = table.rows_of([param])
    m, v, step = torch.zeros_like(param), torch.zeros_like(param), torch.zeros(())

    def run(gradient: Tensor) -> None:
        if kind == "sgd":
            options = SGD | {"momentum": 0.9}
            run_op(_ops, "sgd_step_", [param], [gradient], [m], **options, rows=rows)
        elif kind == "adamw":
            options = ADAM | {"decoupled": True}
            run_op(_ops, "adam_step_", [param], [gradient], [m], [v], [], [step], **options, rows=rows)
        else:
            run_op(_ops, "row_mask_", [param], lr=0.1, rows=rows)

    with torch.no_grad():
        for k in range(1, 6):
            run(torch.zeros_like(param))
            left = torch.tensor([5 - k, 5 - k, max(3 - k, 0)])
            assert table.countdown.tolist() == [*left.tolist(), LIVE]
            want = start[:3].double() * left / torch.tensor([5, 5, 3])
            # One rounding to the dtype for every step.
            error = k * torch.finfo(dtype).eps * start[:3].double().abs()
            assert ((param[:3].double() - want).abs() <= error).all()
        assert not param[:3].any() and not param[:3].signbit().any()
        assert param[3] == start[3]
        run(torch.full_like(param, 7.0))
        assert not param[:3].any()
        assert table.countdown.tolist() == [0, 0, 0, LIVE]
        assert not m[:3].any() and not v[:3].any()


def test_a_row_loses_its_state_when_its_fade_ends() -> None:
    param = Parameter(torch.ones(2))
    table = RowTable([(param, 0)], [])
    table.countdown[0] = 1
    states = [torch.ones(2), torch.ones(2), torch.ones(2)]
    rows = table.rows_of([param])
    run_op(
        _ops,
        "adam_step_",
        [param],
        [torch.tensor([float("nan"), 1.0])],
        *[[state] for state in states],
        [torch.ones(())],
        **ADAM | {"amsgrad": True},
        rows=rows,
    )
    assert param[0] == 0 and param[1] != 1
    assert [state[0].item() for state in states] == [0, 0, 0]
    assert all(state[1] > 0 for state in states)


def test_penalty_acts_on_its_rows_only_and_with_the_rate() -> None:
    param = Parameter(torch.ones(3))
    table = RowTable([(param, 0)], [])
    table.penalty[1] = 0.5
    _sgd(table, [torch.zeros(3)], lr=0.1)
    torch.testing.assert_close(param.detach(), torch.tensor([1.0, 0.95, 1.0]))
    rows = table.rows_of([param])
    zeros = [[torch.zeros(3)] for _ in range(2)]
    options = ADAM | {"lr": 0.1, "decoupled": True}
    run_op(_ops, "adam_step_", [param], [torch.zeros(3)], *zeros, [], [torch.zeros(())], **options, rows=rows)
    torch.testing.assert_close(param.detach(), torch.tensor([1.0, 0.95**2, 1.0]))


@pytest.mark.parametrize("options", [{"found_inf": 1.0}, {"lr": 0.0}, {"lr": torch.tensor(0.0)}])
def test_a_step_without_effect_leaves_no_trace_in_the_means(options: dict[str, Any]) -> None:
    param = Parameter(_randn(4, 3))
    table = RowTable([(param, 0)], [[0], [1, 2]], decay=0.5)
    table.countdown[3] = 4
    for seed in range(2):
        _sgd(table, [_randn(4, 3, seed=seed)], lr=0.1)
        _ops.channel_moments_(table)
    if "found_inf" in options:
        options = {"found_inf": torch.tensor(1.0), "grad_scale": torch.tensor(2.0)}
    before = {n: v.clone() for n, v in table.state_dict().items() if isinstance(v, Tensor)}
    weight, gradient = param.detach().clone(), torch.full((4, 3), float("inf"))
    if "lr" in options:
        gradient = torch.zeros(4, 3)
    _sgd(table, [gradient.clone()], **options)
    _ops.channel_moments_(table)
    assert torch.equal(param, weight)
    for name, value in before.items():
        assert torch.equal(getattr(table, name), value), name
    assert table.updates == 2 and table.countdown[3] == 2


def test_channel_means_sum_over_gates_before_they_square() -> None:
    gamma, beta = Parameter(torch.tensor([2.0, 3.0])), Parameter(torch.tensor([1.0, 0.5]))
    table = RowTable([(gamma, 0), (beta, 0)], [[0, 2], [1, 3], []], decay=0.75)
    grads = [torch.tensor([1.0, -1.0]), torch.tensor([4.0, 2.0])]
    _sgd(table, grads, lr=1e-9)
    assert table.pending == 1
    _ops.channel_moments_(table)
    sums = torch.tensor([2 * 1 + 1 * 4, 3 * -1 + 0.5 * 2, 0.0])
    torch.testing.assert_close(table.channel_dot, 0.25 * sums)
    torch.testing.assert_close(table.channel_dot_sq, 0.25 * sums.square())
    assert table.updates == 1 and table.pending == 0
    unbiased = table.channel_dot / (1 - table.decay**table.updates)
    torch.testing.assert_close(unbiased, sums)


def test_a_parameter_without_gradient_in_a_step_adds_nothing_to_it() -> None:
    first, second = Parameter(torch.ones(1)), Parameter(torch.ones(1))
    table = RowTable([(first, 0), (second, 0)], [[0], [1]], decay=0.5)
    _sgd(table, [torch.ones(1), torch.ones(1)], lr=1e-9)
    _ops.channel_moments_(table)
    assert not table.sums[:, DOT].any()
    run_op(_ops, "sgd_step_", [second], [torch.ones(1)], [], **SGD, rows=table.rows_of([second]))
    _ops.channel_moments_(table)
    torch.testing.assert_close(table.channel_dot, torch.tensor([0.25, 0.75]))


def test_a_row_with_a_bad_gradient_is_left_out_and_counted() -> None:
    param = Parameter(torch.ones(3, 4))
    table = RowTable([(param, 0)], [[0], [1], [2]], decay=0.5)
    _sgd(table, [torch.ones(3, 4)], lr=1e-9)
    _ops.channel_moments_(table)
    threshold = table.threshold.clone()
    gradient = 2 * torch.ones(3, 4)
    gradient[1, 2] = float("nan")
    _sgd(table, [gradient], lr=1e-9)
    assert table.nonfinite == 1
    assert param[1].isnan().tolist() == [False, False, True, False]
    assert table.activity.tolist() == [0.5, 0, 0.5]
    assert table.threshold[1] == threshold[1]
    torch.testing.assert_close(table.threshold[[0, 2]], threshold[[0, 2]] * 2)
    assert not table.sums[1].any()
    _ops.channel_moments_(table)
    torch.testing.assert_close(table.channel_dot, torch.tensor([5.0, 1.0, 5.0]))


def test_a_scale_of_a_power_of_two_changes_nothing() -> None:
    results = []
    for scale in (1, 1024):
        param = Parameter(_randn(6, 5))
        table = RowTable([(param, 0)], [])
        gradient = _randn(6, 5, seed=1) * scale
        options: dict[str, Any] = {}
        if scale != 1:
            options = {"grad_scale": torch.tensor(float(scale)), "found_inf": torch.tensor(0.0)}
        for _ in range(2):
            given = gradient.clone()
            _sgd(table, [given], **options)
            assert torch.equal(given, _randn(6, 5, seed=1))
        results.append((param.detach(), table.sums, table.threshold, table.activity))
    for plain, scaled in zip(*results, strict=True):
        assert torch.equal(plain, scaled)
