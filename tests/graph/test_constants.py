"""Channels that are not zero where their rows are zero go exactly, with the columns that read them."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from constant_functions import CONSTANTS, Gated, LearnableAffine, Net, SharedHeads, StarReLU
from graph.exactness import check, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekern import trace

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def masked_columns(model: nn.Module, example: Tensor = X) -> set[str]:
    groups = trace(randomise(model), example.double()).groups
    return {f"{name}, {dim}" for group in groups for name, dim in group.masked_columns}


@pytest.mark.parametrize("act", CONSTANTS.values(), ids=CONSTANTS.keys())
def test_every_channel_goes_and_names_its_columns(act: Callable[[], nn.Module]) -> None:
    graph = check(Net(act), [X])
    assert [(group.name, len(group.channels)) for group in graph.groups] == [
        ("stem.0", 8),
        ("body.0", 16),
        ("bare.0", 8),
    ]
    assert [group.masked_columns for group in graph.groups] == [
        (("body.0.weight", 1),),
        (("bare.0.weight", 1),),
        (("head.weight", 1),),
    ]
    # The gates are those of the same network with ReLU.
    assert set(graph.gates.names) == {
        "stem.1.weight", "stem.1.bias", "body.1.weight", "body.1.bias", "bare.0.weight", "bare.0.bias",
    }  # fmt: skip
    assert "masked with the columns that read them (not zero themselves): stem.0, body.0 and 1 more" in str(
        graph
    )


def test_a_gate_inside_and_a_sum_of_constants() -> None:
    graph = check(Gated(), [X])
    assert {group.name: group.masked_columns for group in graph.groups} == {
        "stem": (),
        "narrow": (("wide.weight", 1),),
        "left": (("head.weight", 1),),
    }


def test_networks_without_constants_mask_no_columns() -> None:
    assert not masked_columns(Net(nn.ReLU))
    assert not masked_columns(Net(nn.GELU))


class Moved(nn.Module):
    """Constants that are concatenated, shuffled, cropped and flattened before they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.star, self.affine = StarReLU(), LearnableAffine()
        self.head = nn.Linear(6 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.star(self.one(x)), F.relu(self.two(x))], 1)
        x = F.channel_shuffle(F.pad(x, (1, 1, 1, 1), value=2.0)[:, :, 1:-1, 1:-1], 2)
        x = F.softplus(F.dropout(self.grouped(x), 0.0))
        x = F.avg_pool2d(self.affine(self.up(x)), 2, padding=0)
        return self.head(x.flatten(1))


def test_moves_and_grouped_and_transposed_layers() -> None:
    assert len(check(Moved(), [X]).groups) == 3


class Tokens(nn.Module):
    """An MLP over tokens, with a product of matrices in place of the second layer."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)
        self.act, self.plain = StarReLU(), plain

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.up(x))
        return x + (self.down(hidden) if self.plain else hidden @ self.down.weight.t() + self.down.bias)


@pytest.mark.parametrize("plain", [True, False])
def test_a_layer_over_tokens(plain: bool) -> None:
    graph = check(Tokens(plain), [torch.randn(2, 5, 6)])
    assert graph.groups[0].masked_columns == (("down.weight", 1),)


class Kept(nn.Module):
    """Channels whose readers cannot be masked, apart from the first kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)
        self.factor = nn.Parameter(torch.rand(6, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).sigmoid()
        if self.kind == "scaled by the input":
            return self.down(hidden * x[:, :1])
        if self.kind == "divided":
            return self.down(1 / (hidden - 0.5))
        if self.kind == "computed weight":
            return F.linear(hidden, self.down.weight * self.factor + 0.1, self.down.bias)
        if self.kind == "fixed weight":
            return F.linear(hidden, self.down.weight.detach().new_ones(6, 16))
        if self.kind == "summed":
            return self.down.bias * hidden.sum(-1, keepdim=True)
        return self.down(F.layer_norm(hidden, (16,)))


def test_channels_that_depend_on_the_input_where_they_are_masked() -> None:
    graph = check(Kept("scaled by the input"), [torch.randn(2, 6)])
    assert [len(group.channels) for group in graph.groups] == [16]
    assert graph.groups[0].masked_columns == (("down.weight", 1),)


@pytest.mark.parametrize("written", [False, True])
def test_heads_that_share_a_key_and_a_value_head(written: bool) -> None:
    graph = check(SharedHeads(written), [X])
    heads = next(group for group in graph.groups if group.name == "qkv")
    assert len(heads.channels) == 6
    assert heads.masked_columns == (("out.weight", 1),)


@pytest.mark.parametrize(
    "kind",
    ["divided", "computed weight", "fixed weight", "summed", "normed"],
)
def test_what_is_read_in_another_way_stays(kind: str) -> None:
    model = randomise(Kept(kind))
    graph = trace(model, torch.randn(2, 6).double())
    assert graph.num_channels == 0
    assert re.search("not as zero|over channels|fixed size", graph.explain("up.weight"))
