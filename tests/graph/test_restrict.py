"""The graph of a compacted network, with and without a new trace."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from prune.networks import Plain, Residual
from torch import nn

from sparsekern.compact import compact, make_plan
from sparsekern.graph import ChannelGraph, trace
from sparsekern.recipes.models import UNet, lraspp_mobilenetv3

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "residual": Residual,
    "unet": lambda: UNet(3, 1, width=4, depth=2),
    "mobilenet": lambda: lraspp_mobilenetv3("small", classes=1, multiplier=0.25),
}


def some(graph: ChannelGraph, seed: int) -> np.ndarray:
    """About 60 % of the channels, at least two of every group: a trace cannot tell a single one from none."""
    kept = np.random.default_rng(seed).random(graph.num_channels) < 0.6
    for group in graph.groups:
        kept[group.channels[-2:]] = True
    return kept


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
def test_it_is_what_a_trace_of_the_compact_network_gives(make: Callable[[], nn.Module]) -> None:
    model, example = make(), torch.randn(2, 3, 32, 32)
    graph = trace(model, example)
    kept = some(graph, 0)
    ours, traced = graph.restrict(kept), trace(compact(model, make_plan(graph, kept)), example)
    for a, b in zip(ours.groups, traced.groups, strict=True):
        assert (a.id, a.name, a.producers, a.members, a.consumers) == (
            b.id,
            b.name,
            b.producers,
            b.members,
            b.consumers,
        )
        assert (a.channels == b.channels).all()
    assert (ours.group_of == traced.group_of).all()
    assert ours.tensors.keys() == traced.tensors.keys()
    for name, a in ours.tensors.items():
        b = traced.tensors[name]
        assert (a.shape, a.row_dim, a.kind, a.aliases) == (b.shape, b.row_dim, b.kind, b.aliases)
        for own, other in zip(a.channels, b.channels, strict=True):
            assert (own is None) == (other is None)
            assert own is None or (own == other).all()
    assert ours.gates.names == traced.gates.names
    for own, other in zip(ours.gates[:3], traced.gates[:3], strict=True):
        assert (own == other).all()
    again = some(ours, 1)
    assert ours.cost(again) == traced.cost(again)
    for of in ("params", "macs", "activations"):
        assert (ours.price(again, of) == traced.price(again, of)).all()


def test_costs_are_those_of_the_same_channels_in_the_whole_graph() -> None:
    graph = trace(Plain(), torch.randn(2, 3, 8, 8))
    first = some(graph, 0)
    left = graph.restrict(first)
    second = some(left, 1)
    both = np.zeros(graph.num_channels, bool)
    both[np.flatnonzero(first)[second]] = True
    assert left.cost(second) == graph.cost(both)
    assert left.restrict(second).cost(np.ones(int(both.sum()), bool)) == graph.cost(both)


def test_a_group_cannot_go_whole() -> None:
    graph = trace(Plain(), torch.randn(2, 3, 8, 8))
    kept = np.ones(graph.num_channels, bool)
    kept[graph.groups[1].channels] = False
    with pytest.raises(ValueError, match=f"^kept: no channel is left of {graph.groups[1].name}"):
        graph.restrict(kept)
    with pytest.raises(ValueError, match="^kept: got int64"):
        graph.restrict(kept.astype(int))
