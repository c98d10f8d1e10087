"""A network that is compacted before the budget is met comes with a warning; skipped steps do not count."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from prune.networks import Plain, batch, train
from torch import Tensor, nn

import sparsekern
from sparsekern import Pruner

STEPS = 20
FINISH = 12
Make = Callable[[Any], torch.optim.Optimizer]


def adamw(params: Any) -> torch.optim.Optimizer:
    return sparsekern.optim.AdamW(params, lr=1e-3)


def parts(make: Make = adamw, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
    torch.manual_seed(0)
    model = Plain(8)
    optimizer = make(model.parameters())
    defaults: dict = {"keep": 0.2, "steps": STEPS, "events": 3}
    return model, optimizer, Pruner(model, optimizer, batch(0), **(defaults | options))


def warned(act: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    for warning in caught:
        assert warning.category is UserWarning and warning.filename == __file__
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("of", ["params"])
def test_half_way_the_share_and_the_step_are_named(of: str) -> None:
    model, optimizer, pruner = parts(of=of)
    train(model, optimizer, range(7))
    (text,) = warned(lambda: pruner.compact())
    share = pruner.metrics()[f"{of}_share"]
    assert text.startswith(
        f"pruner: got {share:.1%} of the dense {of}, expected at most 20.0%: 7 of 20 steps"
    )
    assert f"met at step {FINISH}" in text
    assert not warned(lambda: pruner.compact()), "once for a state"
    assert not warned(lambda: pruner.plan())
    train(model, optimizer, range(7, 8))
    assert len(warned(lambda: pruner.plan())) == 1
    assert not warned(lambda: pruner.plan(keep=0.5))
    train(model, optimizer, range(8, FINISH))
    assert pruner.finished
    assert not warned(lambda: (pruner.compact(), pruner.plan()))


def test_another_optimizer_steps() -> None:
    model, _, pruner = parts()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(STEPS))
    (text,) = warned(lambda: pruner.compact())
    assert "got 100.0%" in text and "AdamW given to the Pruner has not made a step: another optimizer" in text


def test_no_warning_where_nothing_was_to_go() -> None:
    _, _, pruner = parts(keep=1.0)
    assert not warned(lambda: (pruner.compact(), pruner.plan()))


def test_what_abort_has_restored_is_missing() -> None:
    model, optimizer, pruner = parts(events=1)
    train(model, optimizer, range(5))
    assert pruner.abort()
    train(model, optimizer, range(5, STEPS))
    (text,) = warned(lambda: pruner.compact())
    assert "undone by abort()" in text


def test_channels_that_still_fade_are_counted() -> None:
    model, optimizer, pruner = parts()
    train(model, optimizer, range(FINISH - 1))
    for step in range(FINISH - 1, STEPS):  # gates without a gradient do not fade
        model(batch(step)).square().mean().backward()
        model.bare.weight.grad = model.bare.bias.grad = None
        optimizer.step()
        optimizer.zero_grad()
    assert not pruner.finished
    (text,) = warned(lambda: pruner.compact())
    assert f"{pruner.metrics()['condemned']} channels still fade out, for 1 more steps" in text


def amp(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, skip: set[int], scaler: Any = None
) -> None:
    """Training with a gradient scaler in which the steps ``skip`` overflow."""
    scaler = scaler or torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=1000)
    for step in steps:
        loss = model(batch(step)).square().mean()
        scaler.scale(loss * float("inf") if step in skip else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


SCALED: dict[str, Make] = {
    "sparsekern.AdamW": adamw,
    "sparsekern.SGD": lambda params: sparsekern.optim.SGD(params, lr=0.05, momentum=0.9),
    "torch.SGD": lambda params: torch.optim.SGD(params, lr=0.05),
    "torch.AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
}


@pytest.mark.parametrize("make", SCALED.values(), ids=SCALED.keys())
def test_skipped_steps_postpone_events(make: Make) -> None:
    skip = {0, 1, 4, 5, 6, 9, 16, 17}
    model, optimizer, pruner = parts(make)
    due = [*(event.step for event in pruner._events.schedule.events), FINISH]
    made, before = 0, pruner._network.masks.state.copy()
    for step in range(FINISH + len(skip)):
        assert not pruner.finished
        amp(model, optimizer, range(step, step + 1), skip)
        made += step not in skip
        assert pruner.metrics()["step"] == made
        if not np.array_equal(pruner._network.masks.state, before):
            assert step not in skip and made in due
            before = pruner._network.masks.state.copy()
    assert pruner.finished
    assert pruner.metrics()["macs_share"] <= 0.2
    assert not warned(lambda: pruner.compact())


def test_skipped_steps_alone_prune_nothing() -> None:
    model, optimizer, pruner = parts()
    amp(model, optimizer, range(STEPS), set(range(STEPS)))
    assert pruner.metrics()["step"] == 0 and pruner.metrics()["macs_share"] == 1
    assert "has not made a step" in warned(lambda: pruner.compact())[0]


@pytest.mark.parametrize("stop", [5, 9])
def test_a_training_with_skipped_steps_resumes_bit_by_bit(stop: int, tmp_path: Any) -> None:
    skip, last = {1, 2, 4, 8, 9}, FINISH + 6
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=1000)
    model, optimizer, pruner = parts()
    amp(model, optimizer, range(stop), skip, scaler)
    pruner.save_checkpoint(tmp_path / "checkpoint.pt", scaler=copy.deepcopy(scaler.state_dict()))
    amp(model, optimizer, range(stop, last), skip, scaler)
    other, its, resumed = parts()
    again = torch.amp.GradScaler("cpu")
    again.load_state_dict(resumed.load_checkpoint(tmp_path / "checkpoint.pt")["scaler"])
    amp(other, its, range(stop, last), skip, again)
    assert pruner.finished and resumed.finished
    for (name, value), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, theirs), name
    assert _flat(pruner.state_dict()) == _flat(resumed.state_dict())


def _flat(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.tolist()
    return {name: _flat(value) for name, value in state.items()} if isinstance(state, dict) else state


@pytest.mark.parametrize("make", [adamw, SCALED["torch.SGD"]])
def test_steps_without_any_gradient_do_not_count(make: Make) -> None:
    model, optimizer, pruner = parts(make)
    for _ in range(STEPS):
        optimizer.step()
    assert pruner.metrics()["step"] == 0
    train(model, optimizer, range(FINISH))
    assert pruner.finished


def test_steps_in_the_backward_pass_count() -> None:
    model, optimizer, pruner = parts()
    sparsekern.optim.in_backward(optimizer)
    train(model, optimizer, range(FINISH))
    assert pruner.finished
