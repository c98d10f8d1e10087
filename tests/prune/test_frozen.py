"""Networks with untrained parts: the channels that can still be pruned exactly, and why the others stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import sparsekern

X = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(4, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
STEPS = 16
NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)


def network(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 3, padding=1),
        norm(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        norm(16),
        nn.ReLU(),
        nn.Conv2d(16, 2, 1),
    ]
    return nn.Sequential(*layers).double()


def affines(model: nn.Sequential) -> None:
    for module in model.modules():
        if isinstance(module, NORMS):
            module.requires_grad_(False)


def affines_and_statistics(model: nn.Sequential) -> None:
    affines(model)
    for module in model.modules():
        if isinstance(module, NORMS):
            # As in detection networks, these norms stay in evaluation mode while the rest trains.
            module.running_mean.uniform_(-1, 1)
            module.eval()


def scales(model: nn.Sequential) -> None:
    model[1].weight.requires_grad_(False)
    model[4].weight.requires_grad_(False)


def biases(model: nn.Sequential) -> None:
    for module in model:
        if getattr(module, "bias", None) is not None:
            module.bias.requires_grad_(False)


def convolutions(model: nn.Sequential) -> None:
    model[0].requires_grad_(False)
    model[3].requires_grad_(False)


def first_affine(model: nn.Sequential) -> None:
    model[1].requires_grad_(False)


def trained(model: nn.Sequential, held: bool, kind: type[torch.optim.Optimizer]) -> sparsekern.Pruner:
    """Run a whole training; with ``held`` the optimizer holds the frozen parameters, too."""
    parameters = [p for p in model.parameters() if held or p.requires_grad]
    optimizer = kind(parameters, lr=1e-2)
    pruner = sparsekern.Pruner(model, optimizer, X, keep=0.5, of="params", steps=STEPS)
    for _ in range(STEPS):
        (model(X) - Y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return pruner


OURS, THEIRS = sparsekern.optim.AdamW, torch.optim.SGD


@pytest.mark.parametrize(
    ("freeze", "held", "kind"),
    [
        (affines, False, OURS),
        (affines, True, THEIRS),
        (affines_and_statistics, False, THEIRS),
        (scales, True, OURS),
        (biases, True, THEIRS),
        (convolutions, True, OURS),
        (first_affine, False, OURS),
    ],
)
def test_what_is_partly_frozen_is_pruned_exactly(
    freeze: Callable[[nn.Sequential], None], held: bool, kind: type[torch.optim.Optimizer]
) -> None:
    model = network()
    freeze(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    pruner = trained(model, held, kind)
    small = pruner.compact()
    assert pruner.finished
    assert [group.name for group in pruner.graph.groups] == ["0", "3"]
    assert sum(p.numel() for p in small.parameters()) < 0.55 * sum(p.numel() for p in model.parameters())
    assert sparsekern.verify(model, small, X) < 1e-12
    parameters = dict(model.named_parameters())
    assert all(((parameters[n] == p) | (parameters[n] == 0)).all() for n, p in before.items())


def test_other_norms() -> None:
    model = network(lambda c: nn.GroupNorm(8, c))
    affines(model)
    pruner = trained(model, False, sparsekern.optim.SGD)
    small = pruner.compact()
    assert pruner.finished
    assert sum(p.numel() for p in small.parameters()) < 0.52 * sum(p.numel() for p in model.parameters())
    assert sparsekern.verify(model, small, X) < 1e-12


def test_what_is_not_trained_at_all_stays() -> None:
    model = network()
    model[:2].requires_grad_(False)
    pruner = trained(model, True, sparsekern.optim.SGD)
    assert pruner.finished
    small = pruner.compact()
    assert small[0].out_channels == 16
    assert small[3].out_channels < 16
    assert dict(pruner.graph.frozen)["0.weight"].startswith("its weights and gates are not trained")
    assert sparsekern.verify(model, small, X) < 1e-12


def test_norms_without_an_affine_leave_constants() -> None:
    """A masked filter gives `-mean / sqrt(var + eps)`, so the columns that read it are masked, too."""
    model = network(lambda c: nn.BatchNorm2d(c, affine=False))
    pruner = trained(model, False, sparsekern.optim.SGD)
    small = pruner.compact()
    assert pruner.finished
    assert all(group.masked_columns for group in pruner.graph.groups)
    assert sparsekern.verify(model, small, X) < 1e-12


def test_filters_behind_a_frozen_norm_are_ranked_by_their_gradients() -> None:
    model = network()
    affines(model)
    with torch.no_grad():
        # The head does not read half of the channels: their filters get no gradient at all.
        model[6].weight[:, ::2] = 0
    model[6].requires_grad_(False)
    optimizer = sparsekern.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    settings: dict[str, Any] = {"keep": 0.7, "of": "params", "steps": STEPS, "protect": ["0"]}
    sparsekern.Pruner(model, optimizer, X, select=sparsekern.criteria.Taylor(), **settings)
    for _ in range(STEPS):
        (model(X) - Y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    gone = (model[3].weight == 0).flatten(1).all(1)
    assert gone.any()
    assert not gone[1::2].any()


def test_gates_frozen_in_mid_training_are_not_waited_for() -> None:
    model = network()
    optimizer = sparsekern.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = sparsekern.Pruner(model, optimizer, X, keep=0.5, of="params", steps=STEPS)
    for step in range(STEPS):
        if step == STEPS // 3:
            affines(model)
        (model(X) - Y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert pruner.finished
    assert sparsekern.verify(model, pruner.compact(), X) < 1e-12
