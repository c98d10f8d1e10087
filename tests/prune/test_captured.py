"""A Pruner with steps of a CUDA graph; the capture is faked, and its steps are made at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from prune.networks import Plain, batch, train

import sparsekern
from sparsekern import Pruner
from sparsekern.kernels.native import cuda_library

STEPS = 40


def parts(**options: object) -> tuple[Plain, torch.optim.Optimizer, Pruner]:
    torch.manual_seed(0)
    model = Plain()
    optimizer = sparsekern.optim.AdamW(model.parameters(), lr=1e-2)
    settings: dict = {"keep": 0.4, "steps": STEPS} | options
    return model, optimizer, Pruner(model, optimizer, batch(0), **settings)


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch):
    @contextmanager
    def capture() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(cuda_library, "capturing", lambda: True)
            yield

    return capture


def test_a_captured_step_is_refused_before_it_is_recorded(capture) -> None:
    model, optimizer, pruner = parts()
    train(model, optimizer, range(2))
    before = [param.clone() for param in model.parameters()]
    with (
        capture(),
        pytest.raises(RuntimeError, match="^optimizer: got a step in the capture of a CUDA graph"),
    ):
        train(model, optimizer, range(2, 3))
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert pruner.metrics()["step"] == 2


def test_a_replayed_training_prunes_as_an_eager_one(capture) -> None:
    model, optimizer, pruner = parts()
    train(model, optimizer, range(STEPS))
    replayed, its_optimizer, its_pruner = parts()
    train(replayed, its_optimizer, range(2))
    for step in range(2, STEPS):
        with its_pruner.capturing(), capture():
            train(replayed, its_optimizer, range(step, step + 1))
        assert its_pruner.metrics()["step"] == step
        its_pruner.advance()
    assert its_pruner.finished and its_pruner.plan() == pruner.plan()
    for mine, theirs in zip(replayed.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_several_steps_at_once_make_the_decisions_that_are_due(capture) -> None:
    model, optimizer, pruner = parts()
    train(model, optimizer, range(2))
    for step in range(2, STEPS, 19):
        with pruner.capturing(), capture():
            train(model, optimizer, range(step, step + 19))
        pruner.advance(19)
    assert pruner.metrics()["step"] == STEPS
    assert pruner.metrics()["macs_share"] < 0.6


def test_bad_input(capture) -> None:
    _, _, pruner = parts()
    for steps in (0, -1, 1.5, True, "1"):
        with pytest.raises(ValueError, match="^steps: got .* expected a whole number >= 1"):
            pruner.advance(steps)  # type: ignore[arg-type]
    with pruner.capturing(), capture(), pytest.raises(RuntimeError, match="^pruner: got advance"):
        pruner.advance()
    assert pruner.metrics()["step"] == 0
    _, _, shrinking = parts(shrink=True)
    with (
        pytest.raises(RuntimeError, match="^pruner: got the capture .* with shrink=True"),
        shrinking.capturing(),
    ):
        pass
