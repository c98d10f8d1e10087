"""What all examples share: generated images, a small network, and how well it does."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

CLASSES = 8


def gratings(count: int, size: int = 32, seed: int = 0) -> TensorDataset:
    """Stripes in noise, float32 ``[count, 3, size, size]``, and their direction, int64 ``[count]``."""
    random = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (count,), generator=random)
    angle, phase = y * math.pi / CLASSES, 2 * math.pi * torch.rand(count, generator=random)
    line = torch.arange(size) * (2 * math.pi / 8)
    along = (
        angle.cos()[:, None, None] * line[None, :, None] + angle.sin()[:, None, None] * line[None, None, :]
    )
    stripes = torch.sin(along + phase[:, None, None])[:, None]
    return TensorDataset(stripes + 2 * torch.randn(count, 3, size, size, generator=random), y)


def draw(data: TensorDataset, step: int, batch: int) -> tuple[Tensor, Tensor]:
    """The batch of a step, the same one whenever it is asked for: a resumed run goes on with the next."""
    index = torch.randint(len(data), (batch,), generator=torch.Generator().manual_seed(step))
    x, y = data[index]
    return x, y


def network(width: int = 32) -> nn.Sequential:
    """Three convolutions with batch norm, the mean over the image, a linear layer."""
    layers: list[nn.Module] = []
    for before, after in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
        layers += [
            nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, CLASSES))


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Share of the images whose class has the largest output."""
    x, y = data[:]
    return float((model.eval()(x).argmax(1) == y).float().mean())
