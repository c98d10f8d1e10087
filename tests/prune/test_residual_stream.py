"""A training that shrinks the hidden width under RMSNorm is the masked one, to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graph.exactness import randomise
from graph.residual import Language, WrittenOut
from torch import nn

from sparsekern import Pruner, optim
from sparsekern.nn.held_factor import holds_factors

STEPS = 24
BATCHES = torch.randint(0, 7, (STEPS, 4, 6), generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Language(lambda size: WrittenOut(size, 1.0), size=16, tied=True))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> float:
    logits = model(tokens[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def prepared(shrink: bool) -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
    model = network()
    optimizer = optim.AdamW(model.parameters(), lr=3e-3)
    options = {"keep": 0.4, "of": "params", "steps": STEPS, "events": 3, "round_to": 1}
    return model, optimizer, Pruner(model, optimizer, BATCHES[0][:, :-1], shrink=shrink, **options)


@pytest.fixture(scope="module")
def masked() -> tuple[list[float], nn.Module]:
    model, optimizer, pruner = prepared(False)
    losses = [step(model, optimizer, tokens) for tokens in BATCHES]
    return losses, pruner.compact()


def test_the_losses_are_those_of_the_masked_training(masked: tuple[list[float], nn.Module]) -> None:
    model, optimizer, pruner = prepared(True)
    losses = [step(model, optimizer, tokens) for tokens in BATCHES]
    assert np.allclose(losses, masked[0], rtol=1e-10, atol=0)
    assert model.norm.weight.shape[0] < 16 and holds_factors(model)
    small = pruner.compact()
    assert not holds_factors(small)
    with torch.no_grad():
        tokens = BATCHES[0]
        assert torch.allclose(small(tokens), masked[1](tokens), rtol=1e-9, atol=1e-12)
        assert torch.allclose(small(tokens), model(tokens), rtol=1e-12, atol=1e-14)


def test_a_checkpoint_goes_on_with_the_same_losses(masked: tuple[list[float], nn.Module], tmp_path) -> None:
    half = 18
    model, optimizer, pruner = prepared(True)
    losses = [step(model, optimizer, tokens) for tokens in BATCHES[:half]]
    assert holds_factors(model)
    pruner.save_checkpoint(tmp_path / "run.pt")
    model, optimizer, pruner = prepared(True)
    pruner.load_checkpoint(tmp_path / "run.pt")
    losses += [step(model, optimizer, tokens) for tokens in BATCHES[half:]]
    assert np.allclose(losses, masked[0], rtol=1e-10, atol=0)
