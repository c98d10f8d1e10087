"""Sizes that a program names: they follow channels where they are computed from them, or nothing goes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graph.exactness import check
from torch import Tensor, nn

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


class Recurrence(nn.Module):
    """A state that begins with a tensor of one value, as in Mamba; subclasses make it."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 12
        self.one, self.two = nn.Linear(8, 12), nn.Linear(12, 4)
        self.decay = nn.Parameter(torch.rand(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        state, made = self.begin(y), []
        for step in range(3):
            state = state * self.decay.exp() * y[:, step, :, None] + y[:, step, :, None]
            made.append(state.sum(-1))
        return self.two(torch.stack(made, 1))

    def begin(self, y: Tensor) -> Tensor:
        return torch.zeros(y.shape[0], self.size, 3, dtype=y.dtype)


class OfTheInput(Recurrence):
    def begin(self, y: Tensor) -> Tensor:
        return y.new_zeros((len(y), y.shape[-1], 3))


class Filled(Recurrence):
    def begin(self, y: Tensor) -> Tensor:
        return torch.full((y.shape[0], self.size, 3), 0.5, dtype=y.dtype)


class Expanded(Recurrence):
    def begin(self, y: Tensor) -> Tensor:
        return y.new_ones(len(y), 1, 1).expand(-1, self.size, 3)


class Repeated(Recurrence):
    def begin(self, y: Tensor) -> Tensor:
        return y.new_ones(len(y), 1, 1).repeat(1, self.size, 3)


class Written(Recurrence):
    """The size is a number in the forward."""

    def begin(self, y: Tensor) -> Tensor:
        return torch.zeros(y.shape[0], 12, 3, dtype=y.dtype)


class Added(Recurrence):
    """Ones that are added: the state is not zero where its channel is."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.two(y + torch.ones(y.shape[-1], dtype=y.dtype))


@pytest.mark.parametrize("model", [Recurrence, OfTheInput, Filled, Expanded, Repeated])
def test_a_named_size_follows(model: type[nn.Module]) -> None:
    torch.manual_seed(0)
    graph = check(model(), [X])
    assert [len(group.channels) for group in graph.groups] == [12]


@pytest.mark.parametrize(
    ("model", "reason"), [(Written, "the program depends on its size"), (Added, "reads it not as zero after")]
)
def test_what_stands_beside_another_size_or_value_stays(model: type[nn.Module], reason: str) -> None:
    torch.manual_seed(0)
    graph = check(model(), [X])
    assert graph.num_channels == 0
    assert reason in dict(graph.frozen)["one.weight"]


class Distances(nn.Module):
    """Scores of every head and distance, picked by positions that a program widens to all heads."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.num_heads = how, 4
        self.q, self.k, self.v = (nn.Linear(8, 12) for _ in range(3))
        self.out, self.places = nn.Linear(12, 8), nn.Parameter(torch.randn(11, 12))
        self.register_buffer("distance", torch.arange(6)[:, None] - torch.arange(6)[None] + 5)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = (layer(x).view(n, length, -1, 3).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ self.places.view(11, -1, 3).permute(1, 2, 0)
        index = self.distance[None, None]
        if self.how == "repeat":
            index = index.repeat(n, self.num_heads, 1, 1)
        else:
            index = index.expand(n, {"size": q.shape[1], "attribute": self.num_heads}[self.how], -1, -1)
        scores = (q @ k.transpose(-1, -2) + torch.gather(scores, -1, index)).softmax(-1)
        return self.out((scores @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("how", ["size", "attribute", "repeat"])
def test_positions_that_are_widened_to_all_heads(how: str) -> None:
    torch.manual_seed(0)
    graph = check(Distances(how), [X])
    assert [len(group.channels) for group in graph.groups] == [4]


class InferredSize(nn.Module):
    """The size of a head is inferred, and the scale is computed from it, so that it cannot shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v = (nn.Linear(8, 12) for _ in range(3))
        self.out = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-1, -2) / torch.tensor(float(q.shape[-1])).sqrt()).softmax(-1)
        return self.out((scores @ v).transpose(1, 2).flatten(2))


def test_heads_go_where_a_smaller_copy_refutes_positions_inside_them() -> None:
    torch.manual_seed(0)
    graph = check(InferredSize(), [X])
    assert [len(group.channels) for group in graph.groups] == [4]


class Patterns(nn.Module):
    """Heads are split and joined by einops, which remembers what it computed for the same numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.qkv, self.out = nn.Linear(8, 36), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        rearrange = pytest.importorskip("einops").rearrange
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class Keyed(Patterns):
    """The number of heads is also a key of a table."""

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        scale = {4: 0.5}.get(self.heads, 0.5)
        parts = self.qkv(x).view(n, length, 3, self.heads, 3).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*parts, scale=scale)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("model", [Patterns, Keyed])
def test_numbers_that_are_keys(model: type[nn.Module]) -> None:
    torch.manual_seed(0)
    for _ in range(2):
        graph = check(model(), [X])
        assert [len(group.channels) for group in graph.groups] == [4]


class OneHeadLeft(nn.Module):
    """A bias for every head, picked by places that are computed by writing to a copy.

    With a single head left, ``permute(2, 0, 1).contiguous()`` copies nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table, self.qkv = nn.Parameter(torch.randn(11, 2)), nn.Linear(8, 12)
        self.out = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        places = (torch.arange(6)[:, None] - torch.arange(6)[None]).t().contiguous()
        places += 5
        bias = self.table[places.view(-1)].view(6, 6, -1).permute(2, 0, 1).contiguous()
        q, k, v = (part.view(n, length, -1, 2).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, bias[None])
        return self.out(y.transpose(1, 2).flatten(2))


def test_a_copy_that_is_none_with_one_head_left() -> None:
    torch.manual_seed(0)
    graph = check(OneHeadLeft(), [X])
    assert [len(group.channels) for group in graph.groups] == [2]
