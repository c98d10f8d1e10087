"""Heads go in the ways in which transformers split, normalise and bias them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graph.exactness import check
from torch import Tensor, nn

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Three projections to four heads of three, and one back; subclasses split them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 3
        self.q, self.k, self.v = (nn.Linear(8, 12) for _ in range(3))
        self.out = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.out(self.mixed(q, k, v).transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        shape = (*x.shape[:-1], -1, self.head_dim)
        return tuple(layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class SplitInTwoWays(Attention):
    """The queries name the heads, keys and values the size of a head."""

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        q = self.q(x).view(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)
        return (q, *super().split(x)[1:])


class SplitInThreeWays(Attention):
    """The queries' heads come last, keys and values come from one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(8, 12), nn.Linear(8, 24)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        n, positions, _ = x.shape
        q = self.q(x).view(n, positions, self.head_dim, self.num_heads).permute(0, 3, 1, 2)
        k, v = (
            self.kv(x).view(n, positions, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        )
        return q, k, v


class Normalised(Attention):
    """Queries and keys are normalised over the size of a head, with a weight and without."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = self.scale * (q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + 1e-3))
        k = k * (k.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt().reciprocal()
        return F.scaled_dot_product_attention(q, k, v)


class RelativeBias(Attention):
    """A table of a bias for each head and distance, read by positions in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, 4))
        places = torch.arange(6)
        self.register_buffer("distance", places[:, None] - places[None] + 5)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.table[self.distance.view(-1)].view(6, 6, -1).permute(2, 0, 1)
        return F.scaled_dot_product_attention(q, k, v, bias[None])


class TwoTables(RelativeBias):
    """The table has two dimensions of positions, read by two buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 11, 2))
        self.register_buffer("kind", torch.arange(36).view(6, 6) % 2)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, self.table[:, self.distance, self.kind])


class Gathered(Attention):
    """Scores are picked by distance, as in disentangled attention."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(1, 4, 11, 3))
        distance = torch.arange(6)[:, None] - torch.arange(6)[None] + 5
        self.register_buffer("distance", distance.expand(1, 1, 6, 6))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ self.places.transpose(-1, -2)
        scores = torch.take_along_dim(scores, self.distance, -1)
        return (q @ k.transpose(-1, -2) + scores).softmax(-1) @ v


class OneKeyAndValue(Attention):
    """All heads of the queries share one key and one value, which are repeated for them."""

    def __init__(self, product: str) -> None:
        super().__init__()
        self.k, self.v = nn.Linear(8, 3), nn.Linear(8, 3)
        self.num_key_value_heads, self.num_key_value_groups, self.product = 1, 4, product

    def repeated(self, x: Tensor) -> Tensor:
        if self.num_key_value_groups == 1:
            return x
        n, groups, length, size = x.shape
        x = x[:, :, None].expand(n, groups, self.num_key_value_groups, length, size)
        return x.reshape(n, groups * self.num_key_value_groups, length, size)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.product == "shared":
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        k, v = self.repeated(k), self.repeated(v)
        if self.product == "fused":
            return F.scaled_dot_product_attention(q, k, v)
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v


class Picked(nn.Module):
    """Some positions of a sequence are picked; its channels run beside the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 12), nn.Linear(12, 4)
        self.register_buffer("order", torch.tensor([4, 0, 2]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x).relu()
        places = torch.zeros_like(y[:, :3]).long() + self.order[None, :, None]
        return self.two(torch.gather(y, 1, places))


@pytest.mark.parametrize(
    ("model", "widths"),
    [
        (SplitInTwoWays, [4]),
        (SplitInThreeWays, [4]),
        (Normalised, [4]),
        (RelativeBias, [4]),
        (TwoTables, [4]),
        (Picked, [12]),
    ],
)
def test_whole_heads_go(model: type[nn.Module], widths: list[int]) -> None:
    torch.manual_seed(0)
    graph = check(model(), [X])
    assert [len(group.channels) for group in graph.groups] == widths


@pytest.mark.parametrize("product", ["written", "fused", "shared"])
def test_heads_of_queries_go_that_share_one_key_and_value(product: str) -> None:
    torch.manual_seed(0)
    graph = check(OneKeyAndValue(product), [X])
    assert [(group.name, len(group.channels)) for group in graph.groups] == [("q", 4)]


def test_what_is_picked_beside_broadcast_numbers_stays() -> None:
    torch.manual_seed(0)
    graph = check(Gathered(), [X])
    assert graph.num_channels == 0


class Ordered(Attention):
    """Neither heads nor positions inside them can go; the heads get further, up to the sort."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).cumsum(-1).sort(1).values


def test_the_reason_is_that_of_the_interpretation_that_gets_furthest() -> None:
    torch.manual_seed(0)
    graph = check(Ordered(), [X])
    assert graph.num_channels == 0
    assert "sort puts channels in an order" in dict(graph.frozen)["v.weight"]


class Outer(nn.Module):
    """The products of all pairs of two kinds of channels, merged into one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = nn.Linear(16, 6), nn.Linear(16, 4)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.rows(x)[..., None] * self.columns(x)[..., None, :]).flatten(-2))


def test_of_two_dimensions_that_are_merged_the_first_one_keeps_its_channels() -> None:
    graph = check(Outer(), [torch.randn(2, 16)])
    assert [(group.name, len(group.channels)) for group in graph.groups] == [("rows", 6)]
    assert "flatten merges it with channels" in graph.explain("columns.weight")
