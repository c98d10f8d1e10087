"""Pruners under optimizers as trainers wrap them, several under one, and optimizers with odd state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim.test_unwrap import Forwards, InLists, Lookahead
from prune.networks import Plain, batch
from torch import nn

import sparsekern
from sparsekern import Pruner

DTYPE = torch.float64
STEPS = 20


def make(model: nn.Module, optimizer: Any, **changes: Any) -> Pruner:
    options: dict[str, Any] = {"keep": 0.4, "steps": STEPS, "events": 3, "round_to": 1} | changes
    return Pruner(model, optimizer, batch(0, dtype=DTYPE), **options)


def plain() -> Plain:
    torch.manual_seed(0)
    return Plain().to(DTYPE)


def steps(model: nn.Module, optimizer: Any, count: int = STEPS) -> None:
    for step in range(count):
        model(batch(step, dtype=DTYPE)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def gone(pruner: Pruner) -> float:
    """The largest number in masked rows of trained parameters."""
    largest = 0.0
    for view in pruner._rows.table.views:
        rows = view.param.detach().movedim(view.dim, 0)[pruner._rows.table.countdown[view.slice] == 0]
        largest = max(largest, float(rows.abs().max()) if rows.numel() else 0.0)
    return largest


@pytest.mark.parametrize("inner", [sparsekern.optim.SGD, torch.optim.SGD])
@pytest.mark.parametrize("shrink", [False, True])
def test_slow_weights_of_a_wrapper_revive_nothing(inner: Any, shrink: bool) -> None:
    model = plain()
    optimizer = Forwards(Lookahead(inner(model.parameters(), lr=0.05, momentum=0.9)))
    optimizer.zero_grad = optimizer.anything.zero_grad  # type: ignore[attr-defined]
    pruner = make(model, optimizer, shrink=shrink)
    steps(model, optimizer)
    assert pruner.finished
    assert gone(pruner) == 0
    small, x = pruner.compact(), batch(9, dtype=DTYPE)
    assert sparsekern.verify(model.eval(), small.eval(), x) < 1e-12
    assert all(state["slow"].shape == param.shape for param, state in optimizer.anything.state.items())


def test_slow_weights_that_nobody_can_mask_are_refused() -> None:
    model = plain()
    optimizer = InLists(torch.optim.SGD(model.parameters(), lr=0.05))
    with pytest.raises(TypeError, match=r"^optimizer: got a InLists that keeps \d+ tensors"):
        make(model, optimizer)
    assert not optimizer.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("bad", [None, torch.optim.SGD, plain, "adam"])
def test_what_is_no_optimizer_is_refused(bad: Any) -> None:
    with pytest.raises(TypeError, match="^optimizer: got .*, expected a torch.optim.Optimizer"):
        make(plain(), bad)
