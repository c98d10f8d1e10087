"""Dimensions that are cut at numbers: these follow attributes, or what is cut stays."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph.exactness import check
from torch import Tensor, nn

from sparsekern.compact import compact, make_plan
from sparsekern.graph import trace

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Fused(nn.Module):
    """Queries, keys and values from one layer, for four heads of three; subclasses cut them apart."""

    rows = 36

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.width = 4, 3, 12
        self.qkv, self.out = nn.Linear(8, self.rows), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.cut(self.qkv(x)))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
        return self.out(y.transpose(1, 2).flatten(2))

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = x.split(self.width, -1)
        return tuple(part.view(*part.shape[:-1], -1, self.head_dim) for part in parts)


class Quotient(Fused):
    """The size of a head is computed from the width and the number of heads."""

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        n, positions, width = x.shape
        size = width // 3 // self.num_heads
        return x.reshape(n, positions, 3, self.num_heads, size).unbind(2)


class OfTheWidth(Fused):
    """As in Swin: the width of the input gives the size of a head."""

    def forward(self, x: Tensor) -> Tensor:
        n, positions, _ = x.shape
        width = self.qkv.out_features // 3
        qkv = self.qkv(x).reshape(n, positions, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, positions, -1))


class Slices(Fused):
    """Slices whose bounds are products of attributes; two heads share a key and a value."""

    rows = 12 + 2 * 6

    def __init__(self) -> None:
        super().__init__()
        self.num_key_value_heads = 2

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        queries = self.num_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        parts = x[..., :queries], x[..., queries : queries + keys], x[..., queries + keys :]
        return tuple(part.view(*part.shape[:-1], -1, self.head_dim) for part in parts)


class Groups(Slices):
    """Each group holds its queries, its key and its value, as in Falcon."""

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        share = self.num_heads // self.num_key_value_heads
        x = x.view(*x.shape[:-1], -1, share + 2, self.head_dim)
        return x[..., :-2, :].flatten(2, 3), x[..., -2, :], x[..., -1, :]


class Configured(Slices):
    """The number of heads stands in a configuration that two layers share, as in Phi-3."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=self.num_heads, hidden_size=8)
        del self.num_heads

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        queries = self.config.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        parts = x[..., :queries], x[..., queries : queries + keys], x[..., queries + keys :]
        return tuple(part.view(*part.shape[:-1], -1, self.head_dim) for part in parts)


class Repeated(Slices):
    """Keys and values are repeated for the queries that share them, by a number times a size of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.num_key_value_groups = 2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.cut(self.qkv(x)))
        k, v = self.repeat(k), self.repeat(v)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def repeat(self, x: Tensor) -> Tensor:
        n, heads, length, size = x.shape
        x = x[:, :, None].expand(n, heads, self.num_key_value_groups, length, size)
        return x.reshape(n, heads * self.num_key_value_groups, length, size)


class Negative(Slices):
    """Bounds that are counted from the end."""

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        keys = self.num_key_value_heads * self.head_dim
        parts = x[..., : -2 * keys], x[..., -2 * keys : -keys], x[..., -keys:]
        return tuple(part.view(*part.shape[:-1], -1, self.head_dim) for part in parts)


class Unequal(nn.Module):
    """Three parts of different sizes, each read by a layer of its own, as in Mamba."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.state = 5, 3
        self.project = nn.Linear(8, self.rank + 2 * self.state)
        self.one, self.two = nn.Linear(5, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.project(x).split([self.rank, self.state, self.state], -1)
        return self.one(a) + self.two(b * c)


class Ghost(nn.Module):
    """Cheap features are joined to others, and all but the first few are dropped."""

    def __init__(self, written: bool = False) -> None:
        super().__init__()
        self.wanted, self.written = 9, written
        self.primary, self.cheap = nn.Linear(8, 6), nn.Linear(6, 6)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.primary(x).relu()
        y = torch.cat([x, self.cheap(x).relu()], -1)
        return self.head(y[..., :9] if self.written else y[..., : self.wanted])


class Middle(nn.Module):
    """A slice from the middle: as many channels may go before it as within it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 24), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x).relu()
        return self.two(y[..., 8:16]) + self.three(y[..., 16:])


class Selective(nn.Module):
    """Branches that are weighted by a softmax over them, as in SKNet."""

    def __init__(self) -> None:
        super().__init__()
        self.paths, self.channels = 2, 6
        self.stem = nn.Conv2d(3, 6, 1)
        self.one, self.two = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 5, padding=2)
        self.squeeze, self.weigh = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 12, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        branches = torch.stack([self.one(x).relu(), self.two(x).relu()], 1)
        weights = self.weigh(self.squeeze(branches.sum(1).mean((2, 3), keepdim=True)).relu())
        weights = weights.view(x.shape[0], self.paths, self.channels, 1, 1).softmax(1)
        return self.head((branches * weights).sum(1))


@pytest.mark.parametrize(
    ("model", "widths"),
    [
        (Fused, [4]),
        (Quotient, [4]),
        (OfTheWidth, [4]),
        (Slices, [2]),
        (Groups, [2]),
        (Configured, [2]),
        (Repeated, [2]),
        (Negative, [2]),
        (Unequal, [5, 3]),
        (Ghost, [6, 3, 3]),
    ],
)
def test_numbers_follow_attributes(model: type[nn.Module], widths: list[int]) -> None:
    torch.manual_seed(0)
    for seed in range(2):
        graph = check(model(), [X], seed=seed)
    assert [len(group.channels) for group in graph.groups] == widths


def test_layers_that_share_a_configuration_may_differ() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Configured(), Configured())
    model[1].config = model[0].config
    graph = check(model, [X])
    assert [len(group.channels) for group in graph.groups] == [2, 8, 2]
    kept = np.ones(graph.num_channels, bool)
    kept[graph.groups[0].channels[0]] = False
    small = compact(model, make_plan(graph, kept))
    assert [layer.config.num_attention_heads for layer in small] == [2, 4]
    assert [layer.num_key_value_heads for layer in small] == [1, 2]
    assert [layer.config.num_attention_heads for layer in model] == [4, 4]


def test_what_numbers_in_the_forward_cut_off_stays() -> None:
    """Only the channels behind the last written number go."""
    torch.manual_seed(0)
    graph = check(Middle(), [X])
    assert graph.tensors["one.weight"].channels[0].tolist() == [-1] * 16 + list(range(8))
    graph = trace(Ghost(written=True), X)
    assert {name for name in graph.tensors if "weight" in name} == {"cheap.weight"}
    assert graph.tensors["cheap.weight"].channels[0].tolist() == [-1, -1, -1, 0, 1, 2]


class Shifting(Middle):
    """As many channels may go before a slice as within it, so that only its contents differ."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x).relu()
        return self.two((y[..., :8] * y[..., 8:16]).narrow(-1, 0, 8)) + self.three(y[..., 16:24])


def test_slices_that_shift_stay() -> None:
    torch.manual_seed(0)
    graph = check(Shifting(), [X])
    assert graph.tensors["one.weight"].channels[0].tolist() == [-1] * 16 + list(range(8))


def test_selected_branches() -> None:
    torch.manual_seed(0)
    graph = check(Selective(), [torch.randn(2, 3, 6, 6)])
    assert [len(group.channels) for group in graph.groups] == [6, 6, 4]


class Places(nn.Module):
    """Single features are read by number, some counted from the end; what lies between them may go."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.one, self.two = how, nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x).relu()
        if self.how == "numbers":
            return self.two(y) + y[..., 4, None] + y[..., -2, None]
        if self.how == "lists":
            return self.two(y) + y[..., [4, 1]].sum(-1, keepdim=True) + y[..., [-2]]
        # With fewer features another one stands there.
        return self.two(y) + y[..., y.shape[-1] // 2, None]


@pytest.mark.parametrize(("how", "free"), [("numbers", 5), ("lists", 5), ("half", 0)])
def test_places_that_are_read_by_number_stay(how: str, free: int) -> None:
    torch.manual_seed(0)
    graph = check(Places(how), [X])
    assert graph.num_channels == free
    if free:
        rows = graph.tensors["one.weight"].channels[0]
        assert rows.tolist() == [-1] * 5 + list(range(5)) + [-1] * 2
