"""The channel graph as data: groups, gates, costs, explanations."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from graph.exactness import choose
from torch import Tensor, nn
from torchvision_models import models, torchvision

from sparsekern.graph import ChannelGraph, Group, trace

X = torch.zeros(2, 3, 32, 32)


class Residual(nn.Module):
    """A stream made by two convolutions, a squeezed gate, and a branch with a depthwise layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 12, 1)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.depth_norm = nn.BatchNorm2d(12)
        self.squeeze = nn.Conv2d(12, 4, 1)
        self.excite = nn.Conv2d(4, 12, 1)
        self.narrow = nn.Conv2d(12, 8, 1, bias=False)
        self.narrow_norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        y = self.depth_norm(self.depth(self.wide(x).relu())).relu()
        gate = self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head(x + self.narrow_norm(self.narrow(y * gate)))


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    return trace(Residual(), X)


@pytest.fixture(scope="module")
def resnet() -> ChannelGraph:
    return trace(models.resnet18(weights=None), X)


def gates_of(graph: ChannelGraph, channel: int) -> set[tuple[str, int]]:
    span = slice(graph.gates.offsets[channel], graph.gates.offsets[channel + 1])
    pairs = zip(graph.gates.tensors[span], graph.gates.rows[span], strict=True)
    return {(graph.gates.names[tensor], int(row)) for tensor, row in pairs}


def named(graph: ChannelGraph, name: str) -> Group:
    return next(group for group in graph.groups if group.name == name)


def test_groups(graph: ChannelGraph) -> None:
    assert [(g.name, len(g.channels)) for g in graph.groups] == [("stem", 8), ("wide", 12), ("squeeze", 4)]
    stem, wide, squeeze = graph.groups
    assert stem.producers == ("stem.weight", "narrow.weight")
    assert stem.consumers == (("wide.weight", 1), ("head.weight", 1))
    assert wide.producers == ("wide.weight", "excite.weight", "depth.weight")
    assert set(wide.consumers) == {("squeeze.weight", 1), ("narrow.weight", 1)}
    assert ("depth_norm.running_var", 0) in wide.members
    assert squeeze.members == (("squeeze.weight", 0), ("squeeze.bias", 0), ("excite.weight", 1))


@pytest.mark.parametrize("which", ["graph", "resnet"])
def test_ids_are_contiguous_and_follow_the_first_producer(which: str, request: pytest.FixtureRequest) -> None:
    graph = request.getfixturevalue(which)
    assert np.array_equal(np.concatenate([g.channels for g in graph.groups]), np.arange(graph.num_channels))
    for group in graph.groups:
        assert (graph.group_of[group.channels] == group.id).all()
        slots = graph.tensors[group.producers[0]]
        assert np.array_equal(slots.channels[slots.row_dim], group.channels)
    orders = [list(graph.tensors).index(group.producers[0]) for group in graph.groups]
    assert orders == sorted(orders)


def test_gates_are_norms_where_they_follow_and_filters_elsewhere(graph: ChannelGraph) -> None:
    stem, wide, squeeze = (int(group.channels[2]) for group in graph.groups)
    assert gates_of(graph, stem) == {
        ("stem_norm.weight", 2),
        ("stem_norm.bias", 2),
        ("narrow_norm.weight", 2),
        ("narrow_norm.bias", 2),
    }
    # The rows of ``excite`` pass through a sigmoid: they scale nothing to zero.
    expected = {("wide.weight", 2), ("wide.bias", 2), ("depth_norm.weight", 2), ("depth_norm.bias", 2)}
    assert gates_of(graph, wide) == expected
    assert gates_of(graph, squeeze) == {("squeeze.weight", 2), ("squeeze.bias", 2)}


def test_gates_behind_concatenations_are_all_norms_that_read_them() -> None:
    """Rescaling a filter of a DenseNet changes no output, because every reader normalises."""
    graph = trace(torchvision.models.DenseNet(4, (2,), 6, num_classes=3), X)
    growth = int(named(graph, "features.denseblock1.denselayer1.conv2").channels[1])
    assert gates_of(graph, growth) == {
        (f"features.{norm}.{affine}", 7)
        for norm in ("denseblock1.denselayer2.norm1", "norm5")
        for affine in ("weight", "bias")
    }


def test_rows(graph: ChannelGraph) -> None:
    assert graph.tensors["stem.weight"].row_dim == 0
    assert graph.tensors["stem.weight"].kind == "parameter"
    assert graph.tensors["stem_norm.running_mean"].row_dim is None
    assert graph.tensors["stem_norm.running_mean"].kind == "buffer"
    assert graph.tensors["stem.weight"].channels[1:] == (None, None, None)
    transposed = trace(nn.Sequential(nn.ConvTranspose2d(3, 8, 2), nn.Conv2d(8, 2, 1)), X)
    assert transposed.tensors["0.weight"].row_dim == 1


def test_positions_of_a_flattened_map_belong_to_its_channel() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))
    channels = trace(model, X).tensors["3.weight"].channels[1]
    assert channels.tolist() == np.repeat(np.arange(4), 4).tolist()


@pytest.mark.parametrize("which", ["graph", "resnet"])
@pytest.mark.parametrize("of", ["params", "macs", "activations"])
def test_price_is_the_difference_of_costs(which: str, of: str, request: pytest.FixtureRequest) -> None:
    graph = request.getfixturevalue(which)
    kept = choose(graph, seed=1)
    price, whole = graph.price(kept, of), getattr(graph.cost(kept), of)
    assert (price[~kept] == 0).all()
    generator = np.random.default_rng(0)
    for channel in generator.choice(np.flatnonzero(kept), 20):
        without = kept.copy()
        without[channel] = False
        assert whole - getattr(graph.cost(without), of) == price[channel]


def test_activations_are_the_bytes_of_what_is_made() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))
    graph = trace(model, X)
    kept = np.array([True, False, False, True])
    assert graph.cost(kept).activations == 4 * 2 * 32 * 32 * (2 + 2)


@pytest.mark.parametrize("kept", [np.ones(3, bool), np.ones(24), np.ones((24, 1), bool)])
def test_kept_of_another_kind(graph: ChannelGraph, kept: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"kept: got .*, expected bool\[24\]"):
        graph.cost(kept)
    with pytest.raises(ValueError, match="kept: "):
        graph.price(kept, "params")


def test_unknown_measure(graph: ChannelGraph) -> None:
    with pytest.raises(ValueError, match="of: got 'latency', expected one of params, macs, activations"):
        graph.price(np.ones(24, bool), "latency")


def test_freezing_groups(graph: ChannelGraph) -> None:
    smaller = graph.freeze(["wide"], "it is a test")
    assert [g.name for g in smaller.groups] == ["stem", "squeeze"]
    assert [g.id for g in smaller.groups] == [0, 1]
    assert np.array_equal(np.concatenate([g.channels for g in smaller.groups]), np.arange(12))
    assert smaller.group_of.tolist() == [0] * 8 + [1] * 4
    assert "depth.weight" not in smaller.tensors
    assert smaller.tensors["narrow.weight"].channels[1] is None
    assert dict(smaller.frozen)["wide.weight"] == "it is a test"
    assert "it is a test" in smaller.explain("depth")
    kept = np.ones(24, bool)
    kept[[1, 2, 21]] = False
    old = np.concatenate([graph.groups[0].channels, graph.groups[2].channels])
    assert smaller.cost(kept[old]) == graph.cost(kept)
    assert np.array_equal(smaller.price(kept[old], "macs"), graph.price(kept, "macs")[old])
    for channel in range(12):
        assert gates_of(smaller, channel) == gates_of(graph, int(old[channel]))
    assert graph.num_channels == 24


def test_freezing_by_number_or_group(graph: ChannelGraph) -> None:
    one = graph.freeze([graph.groups[0], 2], "why not")
    assert [g.name for g in one.groups] == ["wide"]
    assert graph.freeze([], "nothing") is graph
    with pytest.raises(ValueError, match="names: got 'neck', expected groups of this graph"):
        graph.freeze(["neck"], "no")
    nothing = graph.freeze(range(3), "all")
    assert nothing.num_channels == 0
    assert nothing.cost(np.zeros(0, bool)) == graph.cost(np.ones(24, bool))
    assert str(nothing)


def test_pickles_without_torch(graph: ChannelGraph) -> None:
    data = pickle.dumps(graph)
    assert b"torch" not in data
    again = pickle.loads(data)
    assert str(again) == str(graph)
    assert again.cost(np.ones(24, bool)) == graph.cost(np.ones(24, bool))


def test_prints_as_a_table(graph: ChannelGraph) -> None:
    text = str(graph)
    lines = text.splitlines()
    assert lines[0].startswith("24 channels in 3 groups; ")
    assert [line.split()[:2] for line in lines[2:5]] == [["stem", "8"], ["wide", "12"], ["squeeze", "4"]]
    assert "not pruned because" in text
    assert "reaches an output of the network: head.weight" in text


def test_explains(graph: ChannelGraph) -> None:
    assert graph.explain("narrow.weight").splitlines() == [
        "narrow.weight, dim 0: 8 of 8 in stem",
        "narrow.weight, dim 1: 12 of 12 in wide",
    ]
    assert "head.weight, dim 0: 5 stay: reaches an output of the network" in graph.explain("head")
    with pytest.raises(ValueError, match="name: got 'tail'"):
        graph.explain("tail")


def test_names_of_groups_are_unique() -> None:
    """Two groups start in the same convolution."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Conv2d(3, 8, 1)
            self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            both = self.both(x)
            return self.head(both + torch.cat([self.left(x), self.right(x)], 1))

    graph = trace(Halves(), X)
    assert [g.name for g in graph.groups] == ["both", "both:2"]
    assert [g.producers[1] for g in graph.groups] == ["left.weight", "right.weight"]
    assert graph.tensors["both.weight"].channels[0].tolist() == list(range(8))


def test_cost_is_fast_enough_to_be_called_hundreds_of_times(resnet: ChannelGraph) -> None:
    """No sum runs over channels: terms are few, whatever the widths."""
    assert len(resnet.costs.terms["macs"].scale) <= 25
    assert resnet.costs.share.shape[1] == len(resnet.groups)
