"""A training that shrinks the hidden width under RMSNorm is the masked one, to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graph.exactness import randomise
from graph.residual import Language, WrittenOut
from torch import nn

from sparsekern import Pruner, optim, prune_once
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


def test_heads_are_as_many_rows_as_they_have() -> None:
    """A head of four rows is half a block of eight: heads go by twos, the features around them by eights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), Heads(), nn.Linear(32, 4))
    inputs = torch.randn(2, 5, 6)
    pruned = prune_once(
        model, inputs, keep=0.5, of="params", round_to=8, select="magnitude", allocate="uniform"
    ).network
    assert pruned[1].qkv.in_features % 8 == 0 and pruned[1].out.in_features % 8 == 0
    assert pruned[1].qkv.in_features < 32 and pruned[1].out.in_features < 32


class Heads(nn.Module):
    """Eight heads of four."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
