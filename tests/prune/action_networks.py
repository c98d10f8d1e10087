"""Small networks of several structures, and their optimizers, for random sequences of user actions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from prune.networks import block
from torch import Tensor, nn

import sparsekern


class Cross(nn.Module):
    """A residual sum, a depthwise convolution and a normalisation behind a convolution with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 6)
        self.wide = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6), nn.ReLU())
        self.narrow = nn.Conv2d(6, 6, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.narrow(self.wide(x))))


class UpDown(nn.Module):
    """A convolution with a stride, a transposed one back, and a skip that is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 5)
        self.down = nn.Conv2d(5, 8, 2, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.head = nn.Conv2d(11, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.relu(self.norm(self.down(x)))
        return self.head(torch.cat([x, torch.relu(self.up(y))], 1))


class Flat(nn.Module):
    """Two convolutions, the second without a normalisation, and a linear head on all pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = block(3, 6)
        self.second = nn.Conv2d(6, 4, 3, stride=4)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(self.first(x))).flatten(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"cross": Cross, "up-down": UpDown, "flat": Flat}

_RATES: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.01}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: sparsekern.optim.SGD(params, momentum=0.9, **_RATES),
    "Adam": lambda params: sparsekern.optim.Adam(params, **_RATES),
    "AdamW": lambda params: sparsekern.optim.AdamW(params, amsgrad=True, **_RATES),
    "torch.AdamW": lambda params: torch.optim.AdamW(params, **_RATES),
    "torch.SGD": lambda params: torch.optim.SGD(params, momentum=0.9, nesterov=True, **_RATES),
}


def made(network: str, seed: int) -> nn.Module:
    """A network in float64 with random weights and running statistics."""
    torch.manual_seed(seed)
    model = NETWORKS[network]().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model
