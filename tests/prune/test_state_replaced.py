"""A load replaces the dict of an optimizer's state, and the Pruner uses the new one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from prune.action_networks import OPTIMIZERS, made
from prune.networks import batch, train
from torch import Tensor, nn

from sparsekern import Pruner

DOUBLE = torch.float64


def _parts(make: str, shrink: bool) -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
    model = made("up-down", 0)
    optimizer = OPTIMIZERS[make](model.parameters())
    options = {"keep": 0.4, "steps": 8, "events": 2, "warmup": 0.1, "finish": 0.7, "round_to": 1}
    return model, optimizer, Pruner(model, optimizer, batch(0, dtype=DOUBLE), shrink=shrink, **options)


@pytest.mark.parametrize("make", ["AdamW", "torch.SGD"])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_training_that_shrinks_goes_on_from_a_checkpoint(make: str, steps: int, tmp_path: Path) -> None:
    model, optimizer, pruner = _parts(make, True)
    train(model, optimizer, range(steps), DOUBLE)
    pruner.save_checkpoint(tmp_path / "checkpoint.pt")
    train(model, optimizer, range(steps, 8), DOUBLE)
    other, other_optimizer, other_pruner = _parts(make, True)
    other_pruner.load_checkpoint(tmp_path / "checkpoint.pt")
    train(other, other_optimizer, range(steps, 8), DOUBLE)
    for mine, theirs in zip(other.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("make", ["Adam", "torch.AdamW"])
def test_masks_after_a_load_clear_the_state_that_was_loaded(make: str) -> None:
    model, optimizer, pruner = _parts(make, False)
    train(model, optimizer, range(1), DOUBLE)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(1, 8), DOUBLE)
    assert pruner.finished
    cleared = 0
    for param in model.parameters():
        values: list[Tensor] = [v for v in optimizer.state[param].values() if v.shape == param.shape]
        rows = [value.flatten(1).any(1) for value in values if value.dim() > 1]
        cleared += sum(int((~row).sum()) for row in rows)
    assert cleared > 0
    optimizer.load_state_dict(copy.deepcopy(_parts_state(make)))
    for param in model.parameters():
        gone = ~param.detach().reshape(len(param), -1).any(1)
        for value in optimizer.state[param].values():
            if value.shape == param.shape:
                assert not value[gone].any()


def _parts_state(make: str) -> dict:
    """The state of a training that masked nothing."""
    model = made("up-down", 0)
    optimizer = OPTIMIZERS[make](model.parameters())
    train(model, optimizer, range(2), DOUBLE)
    return optimizer.state_dict()
