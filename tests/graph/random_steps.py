"""The structures that random networks are composed of: convolutional ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from graph.random_networks import At, Draw, Run, activation, block, conv, drop_path, norm, pick, pooled, step
from torch import Tensor, nn


@step(2, 3)
def plain(draw: Draw, at: At) -> tuple[nn.Module, At]:
    out = draw.width()
    return block(draw, at, out), replace(at, channels=out)


@step(2, 3)
def residual(draw: Draw, at: At) -> tuple[nn.Module, At]:
    """With or without a projection, a scale per layer, stochastic depth, in place or not."""
    out = at.channels if draw.chance(0.6) else draw.width()
    middle = draw.width()
    after = replace(at, channels=out)
    shape = (out, *[1] * at.dims)
    scale = nn.Parameter(torch.full(shape, 1e-6)) if draw.chance(0.3) else None
    drops, inplace = draw.chance(0.3), draw.chance(0.3)

    def run(net: Any, x: Tensor) -> Tensor:
        y = net.body(x)
        y = y if net.scale is None else y * net.scale
        y = drop_path(net, y) if drops else y
        shortcut = net.shortcut(x)
        if inplace:
            y += shortcut
            return net.act(y)
        return net.act(shortcut + y)

    body = nn.Sequential(block(draw, at, middle), block(draw, replace(at, channels=middle), out))
    shortcut = nn.Identity() if out == at.channels else nn.Sequential(conv(at, out), norm(draw, after))
    return Run(run, body=body, shortcut=shortcut, scale=scale, act=activation(draw, after)), after


@step(2, 3)
def dense(draw: Draw, at: At) -> tuple[nn.Module, At]:
    growth, layers = draw.one(4, 6), draw.one(2, 3)
    made, into = nn.ModuleList(), at
    for _ in range(layers):
        before = nn.Sequential(norm(draw, into), activation(draw, into))
        made.append(nn.Sequential(before, conv(into, growth, 3)))
        into = replace(into, channels=into.channels + growth)

    def run(net: Any, x: Tensor) -> Tensor:
        for layer in net.layers:
            x = torch.cat([x, layer(x)], 1)
        return x

    return Run(run, layers=made), into


@step(2, 3)
def concatenation_under_residual(draw: Draw, at: At) -> tuple[nn.Module, At]:
    left, right = draw.width(), draw.width()

    def run(net: Any, x: Tensor) -> Tensor:
        return x + net.back(torch.cat([net.left(x), x, net.right(x)], 1))

    back = conv(replace(at, channels=left + right + at.channels), at.channels)
    return Run(run, left=block(draw, at, left), right=block(draw, at, right), back=back), at


@step(2, 3)
def branches(draw: Draw, at: At) -> tuple[nn.Module, At]:
    """Two branches of one width, joined by an op of two operands."""
    out = draw.width()
    how = draw.one(torch.mul, torch.maximum, torch.minimum, torch.sub, lambda a, b: torch.where(a > b, a, b))
    after = replace(at, channels=out)

    def run(net: Any, x: Tensor) -> Tensor:
        return how(net.left(x), net.right(x))

    return Run(run, left=block(draw, at, out), right=block(draw, at, out)), after


@step(2, 3)
def squeeze_and_excitation(draw: Draw, at: At) -> tuple[nn.Module, At]:
    inner = draw.one(2, 4)
    gate = draw.one(torch.sigmoid, F.hardsigmoid, F.relu)
    if draw.chance():
        layers = (conv(at, inner), conv(replace(at, channels=inner), at.channels))
        return Run(
            lambda net, x: x * gate(net.up(F.relu(net.down(pooled(x))))), down=layers[0], up=layers[1]
        ), at

    def run(net: Any, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        scale = gate(net.up(F.silu(net.down(pooled(x).view(n, c)))))
        return x * scale.view(n, c, *[1] * (x.ndim - 2))

    return Run(run, down=nn.Linear(at.channels, inner), up=nn.Linear(inner, at.channels)), at


@step(2)
def spatial_attention(draw: Draw, at: At) -> tuple[nn.Module, At]:
    def run(net: Any, x: Tensor) -> Tensor:
        return x * net.gate(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()

    return Run(run, gate=conv(replace(at, channels=2), 1, 3)), at


@step(2)
def selected_kernels(draw: Draw, at: At) -> tuple[nn.Module, At]:
    """Branches weighted by a softmax over them."""

    def run(net: Any, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        maps = torch.stack([net.left(x), net.right(x)], 1)
        weights = net.fc(pooled(maps.sum(1))).view(n, 2, c, 1, 1).softmax(1)
        return (maps * weights).sum(1)

    left, right = block(draw, at, at.channels), block(draw, at, at.channels)
    return Run(run, left=left, right=right, fc=conv(at, 2 * at.channels)), at


@step(2, 3)
def depthwise(draw: Draw, at: At) -> tuple[nn.Module, At]:
    times = draw.one(1, 1, 2, 3)
    after = replace(at, channels=at.channels * times)
    made = conv(at, after.channels, 3, groups=at.channels, bias=draw.chance())
    return nn.Sequential(made, norm(draw, after), activation(draw, after)), after


@step(2, 3)
def inverted_residual(draw: Draw, at: At) -> tuple[nn.Module, At]:
    wide = replace(at, channels=2 * at.channels)
    layers = nn.Sequential(block(draw, at, wide.channels), depthwise(draw, wide)[0])
    out = [m for m in layers.modules() if isinstance(m, nn.modules.conv._ConvNd)][-1].out_channels
    project = conv(replace(at, channels=out), at.channels, bias=False)
    return Run(lambda net, x: x + net.project(net.layers(x)), layers=layers, project=project), at


@step(2, 3)
def grouped(draw: Draw, at: At) -> tuple[nn.Module, At]:
    groups = draw.one(*(g for g in (2, 3, 4) if at.channels % g == 0))
    out = groups * draw.one(2, 4)
    after = replace(at, channels=out)
    return nn.Sequential(conv(at, out, 3, groups=groups), norm(draw, after), activation(draw, after)), after


@step(2, 3)
def transposed(draw: Draw, at: At) -> tuple[nn.Module, At]:
    """Half the size first, then back: plain, grouped or depthwise."""
    groups = draw.one(1, *(g for g in (2, at.channels) if at.channels % g == 0))
    out = groups * draw.one(1, 2, 3)
    out *= 1 + out % 2  # an even number, which all structures take
    after = replace(at, channels=out)
    up = pick("ConvTranspose", at)(at.channels, out, 2, stride=2, groups=groups, bias=draw.chance())
    pool = pick(draw.one("MaxPool", "AvgPool"), at)(2)
    return nn.Sequential(pool, up, norm(draw, after), activation(draw, after)), after


@step(2)
def shuffled(draw: Draw, at: At) -> tuple[nn.Module, At]:
    groups = draw.one(*(g for g in (2, 4) if at.channels % g == 0))

    def views(net: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)

    return draw.one(nn.ChannelShuffle(groups), Run(views)), at


@step(2, 3)
def split(draw: Draw, at: At) -> tuple[nn.Module, At]:
    """One half goes through a layer, as in ShuffleNet; halves by number, by size or in slices."""
    half = at.channels // 2
    how = draw.one(
        lambda x: x.chunk(2, 1),
        lambda x: x.split(x.shape[1] // 2, 1),
        lambda x: x.split(half, 1),
        lambda x: x.tensor_split(2, 1),
        lambda x: (x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]),
        lambda x: (x[:, :half], x[:, half:]),
    )
    swap, merge = draw.chance(), draw.one(True, True, False)
    merge = merge or half % 2 == 1

    def run(net: Any, x: Tensor) -> Tensor:
        left, right = how(x)
        right = net.body(right)
        if not merge:
            return left * right
        return torch.cat([right, left] if swap else [left, right], 1)

    body = block(draw, replace(at, channels=half), half)
    return Run(run, body=body), at if merge else replace(at, channels=half)


@step(2)
def folded(draw: Draw, at: At) -> tuple[nn.Module, At]:
    """Space into channels, a layer, and back."""

    def focus(net: Any, x: Tensor) -> Tensor:
        x = torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)
        return F.pixel_shuffle(net.body(x), 2)

    def unshuffle(net: Any, x: Tensor) -> Tensor:
        return F.pixel_shuffle(net.body(F.pixel_unshuffle(x, 2)), 2)

    def unfold(net: Any, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        y = net.body(F.unfold(x, 2, stride=2).unflatten(2, (h // 2, w // 2)))
        return F.fold(y.flatten(2), (h, w), 2, stride=2)

    inside = At(4 * at.channels, at.size // 2)
    out = draw.width()
    return Run(draw.one(focus, unshuffle, unfold), body=block(draw, inside, 4 * out)), replace(
        at, channels=out
    )


@step(2, 3)
def gated(draw: Draw, at: At) -> tuple[nn.Module, At]:
    out = draw.width()
    gate = draw.one(lambda x: F.glu(x, 1), lambda x: (lambda a, b: a * b.tanh())(*x.chunk(2, 1)))
    return Run(lambda net, x: gate(net.conv(x)), conv=conv(at, 2 * out)), replace(at, channels=out)


@step(2, 3)
def moved(draw: Draw, at: At) -> tuple[nn.Module, At]:
    """Channels repeated, turned round or interleaved."""
    how, times = draw.one(
        (lambda x: x.flip(1), 1),
        (lambda x: x.roll(1, 1), 1),
        (lambda x: torch.cat([x, -x], 1), 2),
        (lambda x: torch.stack([x, x.abs()], 2).flatten(1, 2), 2),
        (lambda x: x.repeat_interleave(2, 1), 2),
        (lambda x: x.repeat(1, 2, *[1] * (x.ndim - 2)), 2),
        (lambda x: x[:, torch.arange(x.shape[1] - 1, -1, -1)], 1),
        (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), 1),
        (lambda x: F.pad(x, [0, 0] * (x.ndim - 2) + [1, 1]), 1),
    )
    extra = 2 if how(torch.zeros(1, 4, 2, 2)).shape[1] == 6 else 0
    out = replace(at, channels=at.channels * times + extra)
    body = block(draw, out, out.channels)
    return Run(lambda net, x: net.body(how(x)), body=body), out


@step(2, 3)
def scaled(draw: Draw, at: At) -> tuple[nn.Module, At]:
    """Parameters and buffers beside the layers, and numbers."""
    shape = (1, at.channels, *[1] * at.dims)
    held = draw.one(
        {"scale": nn.Parameter(torch.rand(shape)), "shift": nn.Parameter(torch.rand(shape))},
        {"scale": torch.rand(shape), "shift": torch.zeros(1)},
        {"scale": torch.ones(1), "shift": torch.rand(shape)},
        {"scale": torch.ones(1), "shift": nn.Parameter(torch.rand(1, at.channels, *at.space))},
        {"scale": nn.Parameter(torch.rand(1)), "shift": torch.zeros(1)},
    )
    return Run(lambda net, x: net.scale * x + net.shift, **held), at


@step(2, 3)
def resized(draw: Draw, at: At) -> tuple[nn.Module, At]:
    """Coarser and finer again, added to what was there (as in HRNet)."""
    body = block(draw, at, at.channels)
    mode = draw.one("nearest", "bilinear" if at.dims == 2 else "trilinear")
    pool = pick(draw.one("MaxPool", "AvgPool"), at)(2)

    def run(net: Any, x: Tensor) -> Tensor:
        return x + F.interpolate(net.body(net.pool(x)), scale_factor=2, mode=mode)

    return Run(run, body=body, pool=pool), at


@step(2, 3)
def context(draw: Draw, at: At) -> tuple[nn.Module, At]:
    """A global context: a softmax over positions weights them."""

    def run(net: Any, x: Tensor) -> Tensor:
        weights = net.key(x).flatten(2).softmax(2)
        pooled = torch.matmul(x.flatten(2), weights.transpose(1, 2))
        return x + net.value(pooled.view(*x.shape[:2], *[1] * (x.ndim - 2)))

    return Run(run, key=conv(at, 1), value=conv(at, at.channels)), at
