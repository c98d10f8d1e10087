"""Activations that turn a masked channel into a constant."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class StarReLU(nn.Module):
    """``scale * relu(x) ** 2 + bias``, as in CAFormer and ConvFormer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor([0.9])), nn.Parameter(torch.tensor([-0.4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.relu(x) ** 2 + self.bias


class LearnableAffine(nn.Module):
    """``scale * relu(x) + bias``, as in HGNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor(1.1)), nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.relu(x) + self.bias


class ShiftedPReLU(nn.Module):
    """PReLU of ``x - 1``."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.slope(x - 1)


class ShiftedGelu(nn.Module):
    """GELU of the input plus a learnable number, times a fixed one."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.shift) * 1.7


class InPlace(nn.Module):
    """A number added to a ReLU in place."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).clone().add_(0.5).mul_(1.5)


CONSTANTS: dict[str, Callable[[], nn.Module]] = {
    "StarReLU": StarReLU,
    "LearnableAffine": LearnableAffine,
    "PReLU(x - 1)": ShiftedPReLU,
    "GELU(x + b)": ShiftedGelu,
    "in place": InPlace,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
    "hardsigmoid": nn.Hardsigmoid,
}


class Net(nn.Module):
    """Convolutions with batch norm, one with a bias alone, and a linear head."""

    def __init__(self, act: Callable[[], nn.Module] = LearnableAffine, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), act())
        self.body = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.BatchNorm2d(2 * width), act())
        self.bare = nn.Sequential(nn.Conv2d(2 * width, width, 3), act())
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bare(self.body(self.stem(x))).mean((2, 3)))


class Gated(nn.Module):
    """A squeeze-and-excitation block whose hidden layer has a sigmoid, and a sum with a constant."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.narrow, self.wide = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.left, self.right = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        gate = torch.sigmoid(self.wide(torch.sigmoid(self.narrow(x.mean((2, 3), keepdim=True)))))
        x = x * gate
        x = torch.exp(-self.left(x)) + F.silu(self.right(x))
        return self.head(x.amax((2, 3)))


class Joined(nn.Module):
    """Two constants that are concatenated and read by a layer without a bias before a batch norm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(3, width, 1)
        self.star, self.affine = StarReLU(), LearnableAffine()
        self.mix = nn.Conv2d(2 * width, width, 3, bias=False)
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.star(self.one(x)), F.max_pool2d(self.affine(self.two(x)), 3, 1, 1)], 1)
        x = F.relu(self.norm(self.mix(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class SharedHeads(nn.Module):
    """Attention whose heads share one key and one value head, as in Falcon: a masked head averages values."""

    def __init__(self, written: bool = False, heads: int = 6, size: int = 4) -> None:
        super().__init__()
        self.num_heads, self.size, self.written = heads, size, written
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.qkv, self.out = nn.Linear(8, (heads + 2) * size), nn.Linear(heads * size, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        fused = self.qkv(x).view(*x.shape[:2], self.num_heads + 2, self.size).transpose(1, 2)
        q, k, v = fused[:, :-2], fused[:, [-2]], fused[:, [-1]]
        if self.written:
            mixed = (q @ k.transpose(2, 3) * self.size**-0.5).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = mixed.transpose(1, 2).reshape(*x.shape[:2], self.num_heads * self.size)
        return self.head((x + self.out(mixed)).mean(1))
