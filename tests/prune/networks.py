"""Small networks for the tests of pruning, each with a property that a test needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Plain(nn.Module):
    """Three convolutions with batch norm, one without, and a linear head."""

    def __init__(self, width: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.stem = block(3, width)
        self.body = block(width, 2 * width)
        self.bare = nn.Conv2d(2 * width, width, 3, padding=1)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bare(self.body(self.stem(x))))
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    """A residual sum, so that one channel has several producers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = block(3, width)
        self.left = block(width, width)
        self.right = block(width, 2 * width)
        self.back = nn.Sequential(nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.left(x)
        x = torch.relu(x + self.back(self.right(x)))
        return self.head(x)


def batch(seed: int, *, size: int = 8, images: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(images, 3, size, size, generator=random, dtype=torch.float64).to(dtype)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, dtype: torch.dtype = torch.float32
) -> None:
    """Plain training on noise; step ``n`` always sees the same batch."""
    for step in steps:
        output = model(batch(step, dtype=dtype))
        output.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
