"""Each step equals that of ``torch.optim``, on every backend, and checkpoints load in both directions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optim.cases import assert_same, copies, parameters, set_grads, snapshot
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from sparsekern import optim

STEPS = 50
ULPS = 2.0
PAIRS = {
    "SGD": (optim.SGD, torch.optim.SGD),
    "Adam": (optim.Adam, torch.optim.Adam),
    "AdamW": (optim.AdamW, torch.optim.AdamW),
}


def _options() -> list[tuple[str, dict[str, Any]]]:
    momenta = [(0, 0, False), (0.9, 0, False), (0.9, 0.3, False), (0.9, 0, True)]
    sgd = [
        {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        for momentum, dampening, nesterov in momenta
    ]
    adam = [
        {"amsgrad": amsgrad, "betas": betas, "eps": eps}
        for amsgrad, betas, eps in [
            (False, (0.9, 0.999), 1e-8),
            (True, (0.9, 0.999), 1e-8),
            (True, (0.3, 0.6), 1e-3),
            (False, (0.0, 0.9), 1e-8),
        ]
    ]
    rates = [(0, False, 1e-3), (0, True, 0.05), (0.1, False, 0.05), (0.1, True, 1e-3)]
    common = [{"weight_decay": decay, "maximize": maximize, "lr": lr} for decay, maximize, lr in rates]
    kinds = [("SGD", sgd), ("Adam", adam), ("AdamW", adam)]
    return [(name, own | c) for name, owns in kinds for own in owns for c in common]


OPTIONS = _options()
NAMES = ["-".join([n, *(f"{k}={v}" for k, v in o.items() if v)]) for n, o in OPTIONS]


def _pair(
    name: str, options: dict[str, Any]
) -> tuple[list[Parameter], list[Parameter], Optimizer, Optimizer]:
    ours, theirs = PAIRS[name]
    params, others = parameters(), parameters()
    return params, others, ours(params, **options), theirs(others, foreach=False, **options)


Record = list[tuple[Tensor, dict[str, Tensor]]]


def _record(optimizer: Optimizer) -> Record:
    """Copies of the parameters and their state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state.get(p, {}) for p in params]
    return copy.deepcopy([(p.detach(), dict(s)) for p, s in zip(params, states, strict=True)])


def _assert_one_step_apart(ours: Optimizer, theirs: Optimizer, old: Record) -> None:
    """After one step from the same values, differences are at most so many units in the last place.

    The unit is that of the largest term of each sum, because where terms cancel their rounding errors remain.
    """
    group = theirs.param_groups[0]
    new = zip(_record(ours), _record(theirs), group["params"], old, strict=True)
    for (mine, my_state), (yours, your_state), param, (before, state) in new:
        grad = param.grad.abs() + group["weight_decay"] * before.abs()
        # The size of Adam's steps is about lr, whatever the gradient.
        change = torch.ones(()) if "betas" in group else grad
        for name, value in your_state.items():
            was = state.get(name, torch.zeros(())).abs()
            terms = torch.zeros(()) if name == "step" else grad
            # Squaring doubles a rounding error.
            terms = 2 * terms.square() if name.endswith("sq") else terms
            _assert_within(my_state[name], value, was + terms)
            if name == "momentum_buffer":
                change = change + was + terms
        change = group["lr"] * change + (yours - before).abs()
        _assert_within(mine, yours, before.abs() + change)


def _assert_within(this: Tensor, that: Tensor, terms: Tensor) -> None:
    ulp = torch.nextafter(terms, torch.full_like(terms, torch.inf)) - terms
    assert ((this - that).abs() / ulp).max() <= ULPS


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=NAMES)
def test_every_step_is_that_of_torch(backend: str, name: str, options: dict[str, Any]) -> None:
    params, others, ours, theirs = _pair(name, options)
    for seed in range(STEPS):
        old = _record(theirs)
        set_grads(params, seed, others)
        ours.step()
        theirs.step()
        _assert_one_step_apart(ours, theirs, old)
        _copy(ours, _record(theirs))


@torch.no_grad()
def _copy(optimizer: Optimizer, record: Record) -> None:
    """Copy these values, so that the comparison covers one step only."""
    for param, (value, state) in zip(optimizer.param_groups[0]["params"], record, strict=True):
        param.copy_(value)
        for name in state:
            optimizer.state[param][name].copy_(state[name])


@pytest.mark.parametrize(("name", "options"), OPTIONS[::3], ids=NAMES[::3])
def test_fifty_steps_stay_together(name: str, options: dict[str, Any]) -> None:
    params, others, ours, theirs = _pair(name, options)
    for seed in range(STEPS):
        set_grads(params, seed, others)
        ours.step()
        theirs.step()
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "options"), OPTIONS[1::2], ids=NAMES[1::2])
@pytest.mark.parametrize("fused", [None, True])
def test_checkpoints_load_both_ways_and_go_on(name: str, options: dict[str, Any], fused: bool | None) -> None:
    kinds = PAIRS[name]
    for source, target in (kinds, kinds[::-1]):
        params = parameters()
        first = source(params, fused=fused, **options)
        for seed in range(3):
            set_grads(params, seed)
            first.step()
        saved = copy.deepcopy(first.state_dict())
        moved = copies(params)
        second = target(moved, lr=7.0)
        second.load_state_dict(saved)
        assert_same(snapshot(second), snapshot(first))
        assert second.state_dict()["param_groups"] == first.state_dict()["param_groups"]
        old = _record(first)
        set_grads(params, 9, moved)
        first.step()
        second.step()
        _assert_one_step_apart(second, first, old)


@pytest.mark.parametrize("name", PAIRS)
def test_what_comes_back_from_torch_goes_on_identically(name: str) -> None:
    ours, theirs = PAIRS[name]
    options = {"momentum": 0.9} if name == "SGD" else {"amsgrad": True}
    params = parameters()
    first = ours(params, lr=0.01, **options)
    set_grads(params, 0)
    first.step()
    between = theirs(copies(params), **options)
    between.load_state_dict(copy.deepcopy(first.state_dict()))
    moved = copies(params)
    second = ours(moved, **options)
    second.load_state_dict(copy.deepcopy(between.state_dict()))
    for seed in (1, 2):
        set_grads(params, seed, moved)
        first.step()
        second.step()
    assert_same(snapshot(second), snapshot(first))
