"""A run that is stopped at any step and resumed ends bit-identical to an uninterrupted one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from prune.networks import Plain, batch, train

import sparsekern
from sparsekern import Pruner

STEPS = 24


def parts(seed: int = 0, ours: bool = True) -> tuple[Plain, torch.optim.Optimizer, Pruner]:
    torch.manual_seed(seed)
    model = Plain()
    make = sparsekern.optim.AdamW if ours else torch.optim.RMSprop
    optimizer = make(model.parameters(), lr=1e-3)
    return model, optimizer, Pruner(model, optimizer, batch(0), keep=0.3, steps=STEPS, events=4)


@pytest.mark.parametrize("ours", [True, False], ids=["fused", "hooks"])
@pytest.mark.parametrize("stop", range(1, STEPS, 2))
def test_bit_identical_wherever_it_was_stopped(stop: int, ours: bool, tmp_path: Path) -> None:
    model, optimizer, pruner = parts(ours=ours)
    train(model, optimizer, range(stop))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}
    torch.save(saved, tmp_path / "checkpoint.pt")
    train(model, optimizer, range(stop, STEPS))

    resumed, its_optimizer, its_pruner = parts(seed=1, ours=ours)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    its_optimizer.load_state_dict(state["optimizer"])
    its_pruner.load_state_dict(state["pruner"])
    train(resumed, its_optimizer, range(stop, STEPS))

    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert its_pruner.metrics() == pruner.metrics()
    ours_state, theirs = pruner.state_dict(), its_pruner.state_dict()
    for name, value in ours_state["rows"].items():
        same = torch.equal(value, theirs["rows"][name]) if isinstance(value, torch.Tensor) else True
        assert same, name


def test_the_state_is_a_copy() -> None:
    model, optimizer, pruner = parts()
    train(model, optimizer, range(5))
    state = pruner.state_dict()
    kept = copy.deepcopy(state)
    train(model, optimizer, range(5, 12))
    for name, value in kept["rows"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, state["rows"][name])
    assert torch.equal(kept["channels"], state["channels"])


def test_weights_loaded_over_masks_are_masked_again() -> None:
    model, optimizer, pruner = parts()
    dense = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(STEPS))
    state = pruner.state_dict()
    model.load_state_dict(dense)
    pruner.load_state_dict(state)
    assert sparsekern.verify(model, pruner.compact(), batch(99)) < 1e-5


def test_the_state_of_another_network_is_refused_and_changes_nothing() -> None:
    torch.manual_seed(0)
    wide = Plain(width=24)
    optimizer = sparsekern.optim.AdamW(wide.parameters())
    other = Pruner(wide, optimizer, batch(0), keep=0.3, steps=STEPS, events=4).state_dict()
    model, optimizer, pruner = parts()
    train(model, optimizer, range(6))
    before = pruner.state_dict()
    with pytest.raises(ValueError, match="state: got the channels of another network"):
        pruner.load_state_dict(other)
    assert torch.equal(pruner.state_dict()["channels"], before["channels"])
    assert pruner.metrics()["step"] == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0.4}, "saved with keep=0.4, expected keep=0.3"),
        ({"events": 5}, "saved with events=5, expected events=4"),
        ({"finish": 0.7}, "saved with finish=0.7, expected finish=0.6"),
        ({"select": sparsekern.criteria.Taylor()}, "saved with select="),
    ],
)
def test_the_state_of_other_settings_is_refused(change: dict, message: str) -> None:
    model, optimizer, pruner = parts()
    options: dict = {"keep": 0.3, "steps": STEPS, "events": 4}
    other = Pruner(model, optimizer.__class__(model.parameters()), batch(0), **(options | change))
    with pytest.raises(ValueError, match=message):
        pruner.load_state_dict(other.state_dict())


def test_a_state_of_another_version_is_refused() -> None:
    _, _, pruner = parts()
    with pytest.raises(ValueError, match="got version 9, expected 3"):
        pruner.load_state_dict(pruner.state_dict() | {"version": 9})
