"""The forecast cost of a training against its real cost."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from prune.networks import Plain, Residual, batch, block, train
from torch import nn

import sparsekern
from sparsekern import Pruner

STEPS = 60


def parts(
    network: type[nn.Module] = Plain, make: Any = sparsekern.optim.AdamW, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
    torch.manual_seed(0)
    model = network()
    optimizer = make(model.parameters(), lr=1e-3)
    defaults: dict = {"keep": 0.3, "steps": STEPS, "events": 4, "shrink": True, "round_to": 1}
    return model, optimizer, Pruner(model, optimizer, batch(0), **(defaults | options))


@pytest.mark.parametrize("network", [Plain, Residual])
def test_stages_are_those_that_the_training_goes_through(network: type[nn.Module]) -> None:
    model, optimizer, pruner = parts(network, of="params")
    forecast = pruner.forecast()
    assert forecast.stages[0].start == 0
    assert forecast.stages[-1].stop == STEPS
    assert forecast.time_share is None
    spent = 0
    for stage, following in zip(forecast.stages, [*forecast.stages[1:], None], strict=True):
        assert following is None or following.start == stage.stop
        for step in range(stage.start, stage.stop):
            assert sum(p.numel() for p in model.parameters()) == pytest.approx(stage.params, rel=0.12)
            spent += pruner.graph.cost(pruner._network.masks.state >= 0).macs
            train(model, optimizer, range(step, step + 1))
    dense = STEPS * forecast.stages[0].macs
    # The forecast does not know which layers stay wide: the budget fixes the parameters, not the MACs.
    assert forecast.macs_share == pytest.approx(spent / dense, rel=0.15)
    assert forecast.macs_share < 0.75


@pytest.mark.parametrize(
    ("make", "copies"),
    [
        (sparsekern.optim.AdamW, 2),
        (lambda params, lr: sparsekern.optim.AdamW(params, lr=lr, amsgrad=True), 3),
        (torch.optim.AdamW, 2),
        (torch.optim.SGD, 0),
        (lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9), 1),
        (lambda params, lr: torch.optim.RMSprop(params, lr=lr, momentum=0.9), 2),
    ],
)
def test_bytes_of_weights_gradients_and_state(make: Any, copies: int) -> None:
    _, optimizer, pruner = parts(make=make)
    stage = pruner.forecast().stages[0]
    assert stage.weight_bytes == (2 + copies) * 4 * stage.params
    assert not optimizer.state


def test_bytes_all_reduced_by_each_rank() -> None:
    _, _, pruner = parts()
    assert all(stage.allreduce_bytes == 0 for stage in pruner.forecast().stages)
    for stage in pruner.forecast(ranks=4).stages:
        assert stage.allreduce_bytes == pytest.approx(2 * 3 / 4 * 4 * stage.params, abs=1)


def test_without_shrink_nothing_gets_cheaper() -> None:
    forecast = parts(shrink=False)[2].forecast()
    assert len(forecast.stages) == 1
    assert forecast.macs_share == 1


def test_measuring_changes_nothing_and_times_every_stage() -> None:
    model, optimizer, pruner = parts()
    calls: list[int] = []
    model.stem.register_forward_hook(lambda *_: calls.append(1))
    before, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    forecast = pruner.forecast(measure=batch(0, size=16))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not optimizer.state and not calls
    assert all(p.grad is None for p in model.parameters())
    assert all(stage.seconds and stage.seconds > 0 for stage in forecast.stages)
    assert forecast.dense_seconds == pytest.approx(STEPS * forecast.stages[0].seconds)
    total = sum((stage.stop - stage.start) * stage.seconds for stage in forecast.stages)
    assert forecast.pruner_seconds > 0
    assert forecast.seconds == pytest.approx(total + forecast.pruner_seconds)
    assert forecast.time_share == pytest.approx(forecast.seconds / forecast.dense_seconds)


class Heads(nn.Module):
    """Two branches of equal MACs, of which the second has four times the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(block(3, 16), nn.Conv2d(16, 1, 1))
        self.coarse = nn.Sequential(nn.AvgPool2d(2), block(3, 64), nn.Conv2d(64, 1, 1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.fine(x), self.coarse(x)


def test_the_branch_that_the_loss_ignores_goes_first() -> None:
    def share_of_params(head: int) -> float:
        _, _, pruner = parts(Heads, keep=0.6)
        stages = pruner.forecast(measure=lambda model: model(batch(7))[head].square().mean()).stages
        assert stages[-1].macs <= 0.6 * stages[0].macs
        return stages[-1].params / stages[0].params

    assert share_of_params(0) < 0.5
    assert share_of_params(1) > share_of_params(0) + 0.15


def test_decisions_are_tried_for_any_optimizer_and_criterion() -> None:
    for make, select in (
        (torch.optim.SGD, sparsekern.criteria.GradientCount()),
        (torch.optim.RMSprop, sparsekern.criteria.Random()),
    ):
        _, optimizer, pruner = parts(make=make, select=select)
        hooks = len(optimizer._optimizer_step_post_hooks)
        before = pruner.state_dict()
        stages = pruner.forecast(measure=True).stages
        assert all(one.macs >= other.macs for one, other in itertools.pairwise(stages))
        assert stages[-1].macs <= 0.3 * stages[0].macs
        assert len(optimizer._optimizer_step_post_hooks) == hooks and not optimizer.state
        assert torch.equal(pruner.state_dict()["channels"], before["channels"])


def test_a_loss_that_fails_is_named() -> None:
    with pytest.raises(ValueError, match="^measure: got inputs on which a training step fails"):
        parts()[2].forecast(measure=lambda model: model(torch.zeros(1, 7, 8, 8)))


def test_a_table_is_printed() -> None:
    lines = str(parts()[2].forecast(ranks=2, measure=True)).splitlines()
    assert lines[0].split()[:2] == ["steps", "MACs"]
    assert lines[0].endswith("all-reduced  ms a step")
    assert lines[1].split()[0] == "0-13"
    assert "100.0%" in lines[1]
    assert "of the multiply-adds of a dense one" in lines[-2]
    assert "of its time" in lines[-2]
    assert "2 ranks" in lines[-1]


def test_bad_questions() -> None:
    model, optimizer, pruner = parts()
    for ranks in (0, 1.5, True):
        with pytest.raises(ValueError, match="^ranks: got"):
            pruner.forecast(ranks=ranks)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^measure: got inputs on which a training step fails"):
        pruner.forecast(measure=torch.zeros(1, 7, 8, 8))
    train(model, optimizer, range(STEPS))
    with pytest.raises(RuntimeError, match="^forecast: got a model that has been cut"):
        pruner.forecast()
