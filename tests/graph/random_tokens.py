"""The structures that random networks are composed of: transformers, weights used in odd ways, traps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from graph.random_networks import At, Draw, Run, block, conv, norm, step, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def back(x: Tensor, like: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(like.shape[0], -1, *like.shape[2:])


@step()
def attention(draw: Draw, at: At) -> tuple[nn.Module, At]:
    """Fused or separate projections, fused or written-out product, with or without a class token."""
    heads, size = draw.one(1, 2), draw.one(2, 4)
    width = heads * size
    fused, written, classes, biased = (draw.chance() for _ in range(4))
    before = draw.one(nn.LayerNorm(at.channels), nn.Identity())

    def project(net: Any, x: Tensor) -> tuple[Tensor, ...]:
        n, length, _ = x.shape
        if fused:
            return net.qkv(x).reshape(n, length, 3, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        return tuple(layer(x).view(n, length, heads, size).transpose(1, 2) for layer in net.qkv)

    def run(net: Any, x: Tensor) -> Tensor:
        y = net.before(tokens(x))
        if classes:
            y = torch.cat([net.token.expand(y.shape[0], -1, -1), y], 1)
        q, k, v = project(net, y)
        if written:
            y = (q @ k.transpose(-2, -1) * size**-0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        y = net.out(y.transpose(1, 2).flatten(2))
        return x + back(y[:, 1:] if classes else y, x)

    if fused:
        qkv: nn.Module = nn.Linear(at.channels, 3 * width, bias=biased)
    else:
        qkv = nn.ModuleList(nn.Linear(at.channels, width, bias=biased) for _ in range(3))
    token = nn.Parameter(torch.rand(1, 1, at.channels))
    return Run(run, before=before, qkv=qkv, out=nn.Linear(width, at.channels), token=token), at


@step()
def multihead(draw: Draw, at: At) -> tuple[nn.Module, At]:
    layer = nn.MultiheadAttention(at.channels, 2, batch_first=True)

    def run(net: Any, x: Tensor) -> Tensor:
        y = tokens(x)
        return x + back(net.layer(y, y, y, need_weights=False)[0], x)

    return Run(run, layer=layer), at


@step()
def feed_forward(draw: Draw, at: At) -> tuple[nn.Module, At]:
    """Plain or gated, over channels last."""
    hidden, gated = draw.width(), draw.chance()
    before = draw.one(nn.LayerNorm(at.channels), nn.RMSNorm(at.channels), nn.Identity())

    def run(net: Any, x: Tensor) -> Tensor:
        y = net.one(net.before(x.permute(0, 2, 3, 1)))
        y = F.silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1] if gated else F.gelu(y)
        return x + net.two(y).permute(0, 3, 1, 2)

    one = nn.Linear(at.channels, hidden * (2 if gated else 1))
    return Run(run, before=before, one=one, two=nn.Linear(hidden, at.channels)), at


@step()
def mixer(draw: Draw, at: At) -> tuple[nn.Module, At]:
    positions, hidden = at.size**2, draw.one(8, 12)

    def run(net: Any, x: Tensor) -> Tensor:
        return x + net.two(F.gelu(net.one(x.flatten(2)))).view_as(x)

    return Run(run, one=nn.Linear(positions, hidden), two=nn.Linear(hidden, positions)), at


@step()
def products(draw: Draw, at: At) -> tuple[nn.Module, At]:
    out = draw.width()
    how = draw.one(
        lambda net, x: torch.einsum("nchw,dc->ndhw", x, net.weight),
        lambda net, x: (x.permute(0, 2, 3, 1) @ net.weight.t()).permute(0, 3, 1, 2),
        lambda net, x: F.conv2d(x, net.weight[:, :, None, None]),
        lambda net, x: back(torch.matmul(tokens(x), net.weight.mT), x),
        lambda net, x: F.linear(x.movedim(1, -1), net.weight).movedim(-1, 1),
    )
    return Run(how, weight=nn.Parameter(torch.rand(out, at.channels))), replace(at, channels=out)


@step(2, 3)
def tied(draw: Draw, at: At) -> tuple[nn.Module, At]:
    """Two layers with one weight, or one layer used twice."""
    width = draw.width()
    first, middle = conv(at, width), replace(at, channels=width)
    one, two = conv(middle, width, 3), conv(middle, width, 3)
    if draw.chance():
        two.weight = one.weight
    else:
        two = one
    after = norm(draw, middle)
    return nn.Sequential(first, one, after, nn.ReLU(), two), middle


@step(2, 3)
def reparametrised(draw: Draw, at: At) -> tuple[nn.Module, At]:
    out = draw.width()
    made = conv(at, out, 3)
    how = draw.one("weight norm", "standardised", "halved")
    if how == "weight norm":
        made = nn.utils.parametrizations.weight_norm(made)
        return made, replace(at, channels=out)
    functional = F.conv2d if at.dims == 2 else F.conv3d

    def run(net: Any, x: Tensor) -> Tensor:
        weight = net.conv.weight
        if how == "standardised":
            dims = tuple(range(1, weight.ndim))
            weight = (weight - weight.mean(dims, keepdim=True)) / (weight.std(dims, keepdim=True) + 1e-3)
        return functional(x, weight * 0.5, net.conv.bias, padding=1)

    return Run(run, conv=made), replace(at, channels=out)


@step()
def recurrent(draw: Draw, at: At) -> tuple[nn.Module, At]:
    kind = draw.one(nn.LSTM, nn.GRU)

    def run(net: Any, x: Tensor) -> Tensor:
        return x + back(net.out(net.rnn(tokens(x))[0]), x)

    return Run(run, rnn=kind(at.channels, 6, batch_first=True), out=nn.Linear(6, at.channels)), at


@step(2, 3)
def written_out(draw: Draw, at: At) -> tuple[nn.Module, At]:
    """Sizes and numbers that a smaller layer would have to change."""
    width = at.channels
    how = draw.one(
        lambda net, x: net.body(x.view(x.shape[0], width, -1).view(x.shape)),
        lambda net, x: net.body(x) / x.shape[1] ** 0.5,
        lambda net, x: net.body(x) / math.sqrt(width),
        lambda net, x: net.body(x) if x.shape[1] == width else x,
        lambda net, x: net.body(x) * torch.tensor(x.shape[1]).to(x.dtype),
        lambda net, x: net.body(torch.cat([x[:, :2], x[:, 2:]], 1)),
        lambda net, x: net.body(torch.cat(x.split([1, width - 1], 1)[::-1], 1)),
        lambda net, x: net.body(x) + x.new_full((x.shape[1], *[1] * (x.ndim - 2)), 0.5),
        lambda net, x: net.body(x) + torch.arange(x.shape[1]).view(-1, *[1] * (x.ndim - 2)),
    )
    return Run(how, body=conv(at, at.channels, 3)), at


@step(2, 3)
def region(draw: Draw, at: At) -> tuple[nn.Module, At]:
    """Under autocast that is off, without gradients, or recomputed in the backward pass."""
    body = block(draw, at, at.channels)

    def off(net: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return net.body(x)

    def detached(net: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = net.body(x)
        return x + y

    def recomputed(net: Any, x: Tensor) -> Tensor:
        return checkpoint(net.body, x, use_reentrant=False)

    return Run(draw.one(off, detached, recomputed), body=body), at


@step(2, 3)
def reduced(draw: Draw, at: At) -> tuple[nn.Module, At]:
    """Numbers over channels, space or images."""
    how = draw.one(
        lambda x: x * x.softmax(1),
        lambda x: x * x.sum(1, keepdim=True).sigmoid(),
        lambda x: F.normalize(x, dim=1),
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: x - x.flatten(2).amax(2).view(*x.shape[:2], *[1] * (x.ndim - 2)),
        lambda x: F.layer_norm(x, x.shape[1:]),
        lambda x: x * x.flatten(2).softmax(2).view(x.shape),
        lambda x: x + x.cumsum(1),
        lambda x: x + x.std(1, keepdim=True),
        lambda x: x.sort(1).values,
        lambda x: x.clamp(-1, 1) + x.clamp_min(0.1),
        lambda x: x.masked_fill(x < 0.1, 0.0),
        lambda x: x.masked_fill(x < 0.1, 0.5),
    )
    return Run(lambda net, x: net.body(how(x)), body=conv(at, at.channels)), at
