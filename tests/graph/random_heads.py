"""The heads of random networks."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from graph.random_networks import At, Draw, Head, Run, block, conv
from torch import Tensor, nn


def dense_map(draw: Draw, at: At) -> nn.Module:
    return conv(at, 2)


def pooled_linear(draw: Draw, at: At) -> nn.Module:
    return Run(
        lambda net, x: net.fc(net.hidden(x.flatten(2).mean(2)).relu()),
        hidden=nn.Linear(at.channels, 12),
        fc=nn.Linear(12, 3),
    )


def flattened_linear(draw: Draw, at: At) -> nn.Module:
    size = at.channels * at.size**at.dims
    flat = nn.Flatten() if draw.chance() else Run(lambda net, x: x.contiguous().view(x.size(0), -1))
    return nn.Sequential(flat, nn.Linear(size, 10), nn.ReLU(), nn.Linear(10, 3))


def named(draw: Draw, at: At) -> nn.Module:
    """A dict, with an auxiliary head in training alone."""

    def run(net: Any, x: Tensor) -> dict[str, Tensor]:
        features = net.neck(x)
        out = {"out": net.head(features)}
        if net.training:
            out["aux"] = net.aux(x)
        return out

    aux = nn.Sequential(block(draw, at, 6), conv(At(6, at.size, at.dims), 2))
    return Run(run, neck=block(draw, at, 8), head=conv(At(8, at.size, at.dims), 2), aux=aux)


def pyramid(draw: Draw, at: At) -> nn.Module:
    """A list of maps, each from the one before, all through the same layer."""

    def run(net: Any, x: Tensor) -> list[Tensor]:
        lateral = net.lateral(x)
        coarse = F.max_pool2d(lateral, 2) if x.ndim == 4 else F.max_pool3d(lateral, 2)
        up = F.interpolate(coarse, size=lateral.shape[2:], mode="nearest")
        return [net.shared(lateral + up), net.shared(coarse)]

    wide = At(8, at.size, at.dims)
    return Run(run, lateral=conv(at, 8), shared=nn.Sequential(conv(wide, 8, 3), nn.ReLU(), conv(wide, 2)))


def normalised(draw: Draw, at: At) -> nn.Module:
    """An embedding of length one, with a number of the user's beside it."""

    def run(net: Any, x: Tensor) -> tuple[Tensor, float]:
        return F.normalize(net.fc(x.flatten(2).amax(2)), dim=1), 0.5

    return Run(run, fc=nn.Linear(at.channels, 6))


HEADS: tuple[Head, ...] = (
    dense_map,
    pooled_linear,
    flattened_linear,
    named,
    pyramid,
    normalised,
)
