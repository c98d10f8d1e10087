"""``exact=False``: channels that are normalised or reduced over together may go, with one warning."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph.attention_structures import Fused
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparsekern import Pruner, compact, optim, prune_once, trace
from sparsekern.compact import make_plan
from sparsekern.graph import ChannelGraph
from sparsekern.prune.decide.criteria import Magnitude


class Normalised(nn.Module):
    """Two layers, one of which is normalised over its channels."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(3, 16), norm, nn.Linear(16, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.two(self.norm(self.one(x)))))


class Reduced(nn.Module):
    """A softmax, a mean, and an input over a sigmoid between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(3, 16), nn.Linear(16, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        scale = x[..., :1]
        x = self.one(x)
        x = self.two(x - x.mean(-1, keepdim=True)).softmax(-1)
        return self.head(scale / self.three(x).sigmoid())


class Block(nn.Module):
    """The residual stream of a transformer: a position embedding, norms, heads, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.position = nn.Linear(3, 16), nn.Parameter(torch.randn(1, 9, 16))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
        self.attention, self.up, self.down = Fused(), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.position
        x = x + self.attention(self.norms[0](x))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x).mean(1))


X = torch.randn(2, 9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def halved(graph: ChannelGraph) -> np.ndarray:
    kept = np.ones(graph.num_channels, bool)
    for group in graph.groups:
        kept[group.channels[::2]] = False
    return kept


@pytest.mark.parametrize("norm", [nn.LayerNorm, lambda n: nn.LayerNorm(n, bias=False)])
def test_channels_of_a_norm_may_go(norm: type) -> None:
    torch.manual_seed(0)
    model = Normalised(norm(16)).double()
    assert [group.name for group in trace(model, X).groups] == ["two"]
    with pytest.warns(UserWarning, match=r"exact=False: .*: one \(layer_norm in norm") as caught:
        graph = trace(model, X, exact=False)
    assert len(caught) == 1 and "two (" not in str(caught[0].message)
    assert {group.name: len(group.channels) for group in graph.groups} == {"one": 16, "two": 16}
    kept = np.ones(graph.num_channels, bool)
    kept[graph.groups[0].channels[:8]] = False
    small = compact(model, make_plan(graph, kept))
    assert small.norm.normalized_shape == (8,)
    by_hand = F.linear(X, model.one.weight[8:], model.one.bias[8:])
    by_hand = small.norm(by_hand)
    by_hand = model.head(F.relu(F.linear(by_hand, model.two.weight[:, 8:], model.two.bias)))
    assert (small(X) - by_hand).abs().max() < 1e-12


def test_a_group_norm_of_one_group() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(1, 8), nn.ReLU(), nn.Conv2d(8, 2, 1)).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert trace(model, x).num_channels == 0
    with pytest.warns(UserWarning, match="group_norm in 1 normalises over channels"):
        graph = trace(model, x, exact=False)
    small = compact(model, make_plan(graph, halved(graph)))
    assert (small[1].num_channels, small[1].num_groups) == (4, 1)
    assert small(x).shape == (2, 2, 4, 4)


def test_softmax_mean_and_what_is_not_zero() -> None:
    model = Reduced().double()
    assert trace(model, X).num_channels == 0
    with pytest.warns(UserWarning) as caught:
        graph = trace(model, X, exact=False)
    assert [group.name for group in graph.groups] == ["one", "two", "three"]
    (said,) = (str(warning.message) for warning in caught)
    assert "one (mean reduces over channels)" in said
    assert "two (softmax normalises over channels)" in said
    assert "three (linear in head reads it not as zero after sigmoid)" in said
    assert "not exact: removing some channels changes the others\n  one: mean reduces over channels" in str(
        graph
    )
    assert graph.explain("two.weight").splitlines()[1] == (
        "two.weight, dim 0: not exact: softmax normalises over channels"
    )
    small = compact(model, make_plan(graph, halved(graph)))
    assert [small.one.out_features, small.two.out_features, small.three.out_features] == [8, 6, 4]
    assert small(X).isfinite().all()


def test_the_stream_of_a_transformer() -> None:
    model = Block().double()
    assert {group.name for group in trace(model, X).groups} == {"attention.qkv", "up"}
    with pytest.warns(UserWarning, match="stem"):
        graph = trace(model, X, exact=False)
    assert {group.name: len(group.channels) for group in graph.groups} == {
        "stem": 16,
        "attention.qkv": 4,
        "up": 32,
    }
    kept = halved(graph)
    small = compact(model, make_plan(graph, kept))
    assert small.position.shape == (1, 9, 8)
    cost = graph.cost(kept)
    assert cost.params == sum(p.numel() for p in small.parameters())
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        for training in (False, True):
            assert small.train(training)(X).isfinite().all()
    assert counter.get_total_flops() > 0


def test_nothing_inexact_says_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trace(model, X.float(), exact=False).num_channels == 8


def test_pruner_and_prune_once_pass_it_on() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 16), nn.LayerNorm(16), nn.Linear(16, 2)), X.float()
    with pytest.raises(ValueError, match="without a channel that can be removed"):
        prune_once(model, x, keep=0.6, select=Magnitude())
    with pytest.warns(UserWarning, match="exact=False"):
        pruned = prune_once(model, x, keep=0.6, select=Magnitude(), exact=False)
    assert pruned.network[1].normalized_shape == (9,)
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match="exact=False"):
        pruner = Pruner(model, optimizer, x, keep=0.6, steps=40, exact=False)
    for _ in range(40):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert pruner.finished
    small = compact(model, pruner.plan())
    assert small[1].normalized_shape == (9,)
    assert small(x).isfinite().all()
