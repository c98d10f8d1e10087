"""The structures that random networks are composed of: blocks of language models."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from graph.random_networks import At, Draw, step, tokens
from graph.random_tokens import back
from graph.residual import Called, Divided, Numbered, WrittenOut
from torch import Tensor, nn


class Attention(nn.Module):
    """Heads that share keys and values in groups; the layers may be fused in one of several ways."""

    def __init__(self, draw: Draw, width: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = draw.one(2, 4), draw.one(2, 4)
        self.num_key_value_heads = draw.one(*(n for n in (1, 2, 4) if self.num_heads % n == 0))
        self.form = draw.one("layers", "split", "slices", "groups", "equal")
        if self.form == "equal":
            self.num_key_value_heads = self.num_heads
        self.inner = self.num_heads * self.head_dim
        self.shared = self.num_key_value_heads * self.head_dim
        bias = draw.chance()
        rows = (self.inner, self.shared, self.shared)
        if self.form == "layers":
            self.project: nn.Module = nn.ModuleList(nn.Linear(width, n, bias=bias) for n in rows)
        else:
            self.project = nn.Linear(width, sum(rows), bias=bias)
        self.out = nn.Linear(self.inner, width, bias=bias)
        self.q_norm, self.k_norm = (draw.one(nn.Identity(), WrittenOut(self.head_dim)) for _ in range(2))
        self.product = draw.one("fused", "written", "repeated")

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        heads: Any = (-1, self.head_dim)
        if self.form == "layers":
            parts = tuple(layer(x) for layer in self.project)  # type: ignore[attr-defined]
        else:
            y = self.project(x)
            keys = self.num_key_value_heads * self.head_dim
            queries = self.num_heads * self.head_dim
            if self.form == "groups":
                share = self.num_heads // self.num_key_value_heads
                y = y.view(*y.shape[:-1], -1, share + 2, self.head_dim)
                return y[..., :-2, :].flatten(2, 3), y[..., -2, :], y[..., -1, :]
            if self.form == "split":
                parts = y.split([self.inner, self.shared, self.shared], -1)
            elif self.form == "slices":
                parts = y[..., :queries], y[..., queries : queries + keys], y[..., queries + keys :]
            else:
                parts = y.chunk(3, -1)
        return tuple(part.view(*part.shape[:-1], *heads) for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projected(x)
        q, k, v = (part.transpose(1, 2) for part in (self.q_norm(q), self.k_norm(k), v))
        share = q.shape[1] // k.shape[1]
        if self.product == "fused":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=share > 1)
        else:
            if share > 1 and self.product == "written":
                k, v = (part.repeat_interleave(share, 1) for part in (k, v))
            elif share > 1:
                n, groups, length, size = k.shape
                k, v = (
                    part[:, :, None].expand(n, groups, share, length, size).reshape(n, -1, length, size)
                    for part in (k, v)
                )
            y = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Plain or gated; the gate has its own layer, or half of one."""

    def __init__(self, draw: Draw, width: int) -> None:
        super().__init__()
        self.hidden, self.form = draw.one(6, 8, 12), draw.one("plain", "layers", "chunk", "split", "slices")
        double = self.form in ("chunk", "split", "slices")
        self.up = nn.Linear(width, self.hidden * (2 if double else 1), bias=False)
        self.gate = nn.Linear(width, self.hidden, bias=False) if self.form == "layers" else None
        self.down = nn.Linear(self.hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.gate is not None:
            y = F.silu(self.gate(x)) * y
        elif self.form == "chunk":
            gate, y = y.chunk(2, -1)
            y = F.silu(gate) * y
        elif self.form == "split":
            gate, y = y.split(self.hidden, -1)
            y = F.gelu(gate) * y
        elif self.form == "slices":
            y = F.silu(y[..., : self.hidden]) * y[..., self.hidden :]
        else:
            y = F.gelu(y)
        return self.down(y)


class Stream(nn.Module):
    """A residual stream of one to three blocks, with norms before them, and perhaps after them, too."""

    def __init__(self, draw: Draw, width: int) -> None:
        super().__init__()
        norm = draw.one(
            nn.RMSNorm,
            WrittenOut,
            lambda size: WrittenOut(size, 1.0),
            Divided,
            Called,
            Numbered,
            nn.LayerNorm,
        )
        both = draw.chance(0.3)
        kinds = [draw.one(Attention, FeedForward) for _ in range(draw.one(1, 2, 3))]
        self.blocks = nn.ModuleList(kind(draw, width) for kind in kinds)
        self.before = nn.ModuleList(norm(width) for _ in kinds)
        self.after = nn.ModuleList(norm(width) if both else nn.Identity() for _ in kinds)
        self.last = norm(width) if draw.chance(0.7) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = tokens(x)
        for block, before, after in zip(self.blocks, self.before, self.after, strict=True):
            y = y + after(block(before(y)))
        return back(self.last(y), x)


@step()
def stream(draw: Draw, at: At) -> tuple[nn.Module, At]:
    return Stream(draw, at.channels), at
