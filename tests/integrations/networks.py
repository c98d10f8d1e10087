"""A network and data that both trainers train, and what has to be equal at the end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CLASSES, SIZE = 4, 8


class Network(nn.Module):
    """Two convolutions with batch norm, and a linear head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
        )
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def images(count: int) -> tuple[Tensor, Tensor]:
    """float32 ``[count, 3, 8, 8]`` of noise, brighter in the channel of its class; int64 ``[count]``."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, SIZE, SIZE, generator=random)
    y = torch.arange(count) % CLASSES
    x[torch.arange(count), y % 3] += y[:, None, None] / CLASSES
    return x, y


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Bit for bit, through dicts and lists."""
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key, value in left.items():
            assert_same(value, right[key], f"{where}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    else:
        assert left == right, where
