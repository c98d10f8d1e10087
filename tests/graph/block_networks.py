"""Small networks of residual blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import sparsekern
from sparsekern.graph import Block, ChannelGraph

WIDTH = 8


class Attention(nn.Module):
    """Causal attention with a cache of keys and values, whose entry it finds by ``layer_idx``."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.layer_idx = index
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cache: list[Any] | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (6, -1)).transpose(1, 2).chunk(3, 1)
        if cache is not None:
            if cache[self.layer_idx] is not None:
                k, v = (torch.cat(pair, 2) for pair in zip(cache[self.layer_idx], (k, v), strict=True))
            cache[self.layer_idx] = k, v
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return self.proj(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A block of a pre-norm transformer."""

    def __init__(self, index: int, drop: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), Attention(index)
        self.norm2, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, cache: list[Any] | None = None) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x), cache))
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm2(x)))))


class Transformer(nn.Module):
    """A decoder of token ids; ``config`` counts its blocks and lists their kinds."""

    def __init__(self, layers: int = 4, drop: float = 0.0) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            num_hidden_layers=layers, layer_types=[f"kind {n}" for n in range(layers)]
        )
        self.embed = nn.Embedding(16, WIDTH)
        self.layers = nn.ModuleList(Layer(number, drop) for number in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16)

    def forward(self, ids: Tensor, cache: list[Any] | None = None) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            x = layer(x, cache)
        return self.head(self.norm(x))

    @torch.no_grad()
    def generate(self, ids: Tensor, count: int) -> Tensor:
        """The ids with ``count`` more, one after the other, from the cache."""
        cache: list[Any] = [None] * self.config.num_hidden_layers
        new = ids
        for _ in range(count):
            new = self(new, cache)[:, -1:].argmax(-1)
            ids = torch.cat([ids, new], 1)
        return ids


class Residual(nn.Module):
    """A block as in ResNet: ``relu(x + branch(x))``, in place."""

    def __init__(self, inputs: int = WIDTH, outputs: int = WIDTH) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.shortcut is None else self.shortcut(x)
        return self.relu(out)


class ResNet(nn.Module):
    """Two stages; the first block of each gets an input that may be negative, or another width."""

    def __init__(self, first: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, WIDTH, 3, padding=1), first()
        self.stage1 = nn.Sequential(Residual(), Residual(), Residual())
        self.stage2 = nn.Sequential(Residual(WIDTH, 12), Residual(12, 12))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage2(self.stage1(self.act(self.stem(x)))).mean((2, 3)))


def block(graph: ChannelGraph, path: str) -> Block:
    return next(block for block in graph.blocks if block.path == path)


@torch.no_grad()
def without(model: nn.Module, graph: ChannelGraph, *paths: str) -> Any:
    """Zero the writers of blocks; returns the channels that stay without the blocks, bool ``[C]``."""
    kept = graph.all_channels()
    for path in paths:
        one = block(graph, path)
        kept[one.channel] = False
        for name in one.writers:
            model.get_parameter(name).zero_()
    return graph.without_inner(kept)


def tokens() -> Tensor:
    return torch.arange(12).reshape(2, 6) % 16


def transformer(**options: Any) -> tuple[Transformer, ChannelGraph]:
    torch.manual_seed(0)
    model = Transformer(**options).double().eval()
    return model, sparsekern.trace(model, tokens(), depth=True)


def images() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
