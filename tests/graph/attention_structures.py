"""Attention in the forms in which it is written: heads go whole, or not at all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from graph.structures import Piece, structure
from torch import Tensor, nn


class Fused(nn.Module):
    """Queries, keys and values from one layer; the numbers of heads are attributes."""

    def __init__(self, heads: int = 4, size: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.inner = heads, size, heads * size
        self.qkv = nn.Linear(16, 3 * heads * size)
        self.proj = nn.Linear(heads * size, 16)

    def forward(self, x: Tensor) -> Tensor:
        n, positions, _ = x.shape
        qkv = self.qkv(x).reshape(n, positions, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(n, positions, self.inner))


class Separate(nn.Module):
    """Three layers, the product written out, a bias and a temperature of every head."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(64, 4))
        self.temperature = nn.Parameter(torch.rand(4, 1, 1))
        self.proj = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        n, positions, _ = x.shape
        q, k, v = (f(x).view(n, positions, self.heads, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = q @ k.transpose(-2, -1) * self.temperature + self.bias.t()[None, :, None]
        y = weights.softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


class Grouped(Fused):
    """Every two heads of the queries share keys and values; the mask is one of every head."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = nn.Linear(16, 2 * 2 * 4)
        self.q = nn.Linear(16, 16)
        self.mask = nn.Parameter(torch.randn(4, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        n, positions, _ = x.shape
        q = self.q(x).view(n, positions, -1, 4).transpose(1, 2)
        k, v = (part.view(n, positions, -1, 4).transpose(1, 2) for part in self.kv(x).chunk(2, -1))
        y = F.scaled_dot_product_attention(q, k, v, self.mask, enable_gqa=True)
        return self.proj(y.transpose(1, 2).reshape(n, positions, -1))


class Fixed(Fused):
    """The width of the result is that of the input: no head can go."""

    def forward(self, x: Tensor) -> Tensor:
        n, positions, width = x.shape
        qkv = self.qkv(x).reshape(n, positions, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(n, positions, width))


def _over_positions(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])


@structure(16 + 4 + 16, layer=Fused)
def heads_of_one_layer(net: Piece, x: Tensor) -> Tensor:
    return _over_positions(net.layer, x)


@structure(16 + 4 + 16, layer=Separate)
def heads_of_three_layers(net: Piece, x: Tensor) -> Tensor:
    return _over_positions(net.layer, x)


@structure(16 + 2 + 16, layer=Grouped)
def heads_that_share_keys(net: Piece, x: Tensor) -> Tensor:
    return _over_positions(net.layer, x)


@structure(16, layer=Fixed)
def heads_of_fixed_width(net: Piece, x: Tensor) -> Tensor:
    return _over_positions(net.layer, x)
