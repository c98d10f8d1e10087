"""GradScaler leaves unscaling and skipping to the step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optim.cases import (
    OptimizerFactory,
    assert_near,
    assert_same,
    attached_table,
    copies,
    parameters,
    set_grads,
    snapshot,
)
from torch import Tensor
from torch.nn import Parameter


def scaled_loss(params: list[Parameter], factor: float = 1.0) -> Tensor:
    return torch.stack([(p * p * factor).sum() for p in params]).sum()


def test_scaler_steps_as_with_torch(under: OptimizerFactory) -> None:
    params, others = parameters(), parameters()
    pairs = []
    for make, ps in ((under, params), (under.theirs, others)):
        pairs.append((make(ps), ps, torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)))
    for step in range(6):
        for optimizer, ps, scaler in pairs:
            optimizer.zero_grad()
            scaler.scale(scaled_loss(ps, float("inf") if step == 4 else 1.0)).backward()
            if step % 2:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(ps, 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert pairs[0][2].get_scale() == pairs[1][2].get_scale()
        assert not hasattr(pairs[0][0], "grad_scale")
    assert_near(params, others)
    steps = [s["step"] for s in pairs[0][0].state.values() if "step" in s]
    assert all(step == 5 for step in steps)


def test_gradients_are_unscaled_in_place(under: OptimizerFactory) -> None:
    params = parameters()
    ours = under(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(scaled_loss(params)).backward()
    expected = [2 * p.detach() for p in params]
    scaler.step(ours)
    assert_near([p.grad for p in params], expected)


@pytest.mark.parametrize("inf_in_first_step", [True, False])
def test_a_skipped_step_changes_nothing(under: OptimizerFactory, inf_in_first_step: bool) -> None:
    params = parameters()
    ours = under(params)
    twin_params = copies(params)
    twin = under(twin_params)
    if not inf_in_first_step:
        set_grads(params, 0, twin_params)
        ours.step()
        twin.step()
    before = [p.detach().clone() for p in params]
    set_grads(params, 1)
    ours.grad_scale, ours.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    ours.step()
    del ours.grad_scale, ours.found_inf
    assert_same([p.detach() for p in params], before)
    for seed in (2, 3):
        set_grads(params, seed, twin_params)
        ours.step()
        twin.step()
    assert_same(snapshot(ours, attached_table(ours)), snapshot(twin, attached_table(twin)))


def test_found_inf_may_be_summed_over_devices(under: OptimizerFactory) -> None:
    params = parameters()
    ours = under(params)
    before = copy.deepcopy([p.detach() for p in params])
    set_grads(params, 0)
    ours.found_inf = torch.tensor(2.0)
    ours.step()
    assert_same([p.detach() for p in params], before)


def test_a_scale_of_the_users_own_counts_too(under: OptimizerFactory) -> None:
    params, others = parameters(), parameters()
    ours, theirs = under(params), under.theirs(others)
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=8.0)
    for seed in range(2):
        set_grads(params, seed, others)
        for param in params:
            param.grad *= 16.0
        ours.grad_scale = torch.tensor(2.0)
        scaler.scale(torch.ones(()))
        scaler.step(ours)
        scaler.update()
        theirs.step()
    assert_near(params, others)
