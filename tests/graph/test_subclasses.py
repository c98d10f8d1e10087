"""Subclasses of torch's layers with tensors of their own, of any size: they cost no channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from graph.exactness import check
from torch import Tensor, nn
from torch.nn.utils import parametrize

X = torch.rand(2, 3, 6, 6)
Forward = Callable[["Conv", Tensor], Tensor]


class Conv(nn.Conv2d):
    """A convolution with one more tensor, which ``use`` does something with."""

    def __init__(self, made: Tensor, use: Forward, *, buffer: bool = False) -> None:
        super().__init__(8, 8, 3, padding=1)
        if buffer:
            self.register_buffer("extra", made)
        else:
            self.extra = nn.Parameter(made)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)

    def with_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self.bias, padding=1)


def ignores_it(conv: Conv, x: Tensor) -> Tensor:
    return conv.with_weight(x, conv.weight)


def scales_the_weight(conv: Conv, x: Tensor) -> Tensor:
    return conv.with_weight(x, conv.weight * conv.extra)


def scales_the_output(conv: Conv, x: Tensor) -> Tensor:
    return conv.with_weight(x, conv.weight) * conv.extra


def scales_the_input(conv: Conv, x: Tensor) -> Tensor:
    return conv.with_weight(x * conv.extra[:, None, None], conv.weight)


class LowRank(nn.Linear):
    """A weight with two matrices of rank 4 beside it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.rand(4, inputs)), nn.Parameter(torch.rand(outputs, 4))
        self.scale = nn.Parameter(torch.ones(1))


class Added(LowRank):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.scale * (self.up @ self.down), self.bias)


class Applied(LowRank):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up) * self.scale


class Norm(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("history", torch.zeros(4, 5))
        self.gain, self.gains = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain * self.gains[:, None, None]


class Groups(nn.GroupNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(4, channels)
        self.alpha = nn.Parameter(torch.ones(1))


class Layers(nn.LayerNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("table", torch.zeros(3, 4))


class Prelu(nn.PReLU):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.table = nn.Parameter(torch.rand(3, 2))


class Activation(nn.ReLU):
    """Of a class of torch that has no tensors itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.alpha = nn.Parameter(torch.ones(channels, 1, 1)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale * self.alpha


class Attention(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(8, 4, batch_first=True)
        self.register_buffer("temperature", torch.ones(1))
        self.register_buffer("positions", torch.ones(7, 3))


class Scale(nn.Module):
    """A parametrisation with parameters of several sizes."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale, self.alpha = nn.Parameter(torch.rand(shape)), nn.Parameter(torch.ones(1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale * self.alpha


def parametrised() -> nn.Module:
    conv = Conv(torch.ones(1), scales_the_weight)
    parametrize.register_parametrization(conv, "weight", Scale(8, 1, 1, 1))
    parametrize.register_parametrization(conv, "bias", Scale(8))
    parametrize.register_parametrization(conv, "extra", Scale(1))
    return conv


def widths(model: nn.Module, x: Tensor = X) -> dict[str, int]:
    return {group.name: len(group.channels) for group in check(model, (x,)).groups}


def chain(*layers: nn.Module) -> nn.Module:
    between = [part for layer in layers for part in (layer, nn.ReLU())]
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), *between, nn.Conv2d(8, 2, 1))


def test_scalars_and_tensors_of_other_sizes() -> None:
    convs = [
        Conv(torch.ones(1), scales_the_weight),
        Conv(torch.ones(1), scales_the_output),
        Conv(torch.ones(1), ignores_it),
        Conv(torch.ones(5), ignores_it, buffer=True),
        Conv(torch.tensor(1.5), scales_the_weight, buffer=True),
        Conv(torch.tensor(1.5), scales_the_output),
        Conv(torch.rand(3, 3), scales_the_weight),
    ]
    assert list(widths(chain(*convs)).values()) == [8] * 8


def test_tensors_with_channels() -> None:
    convs = [
        Conv(torch.rand(1, 8, 1, 1), scales_the_output),
        Conv(torch.rand(8, 1, 1, 1), scales_the_weight),
        Conv(torch.rand(8, 1, 1), scales_the_output, buffer=True),
        Conv(torch.rand(8), scales_the_input),
        Conv((torch.rand(8, 8, 3, 3) > 0.3).double(), scales_the_weight, buffer=True),
        parametrised(),
    ]
    assert list(widths(chain(*convs)).values()) == [8] * 7


def test_matrices_of_low_rank_are_pruned_with_the_weight_and_in_their_rank() -> None:
    layers = [nn.Linear(6, 16), nn.ReLU(), Added(16, 12), nn.ReLU(), Applied(12, 10), nn.ReLU()]
    found = widths(nn.Sequential(*layers, nn.Linear(10, 2)), torch.rand(5, 6))
    assert sorted(found.values()) == [4, 4, 10, 12, 16]


def test_normalisations_and_activations() -> None:
    kinds: list[Any] = [Norm, Groups, Prelu, Activation]
    parts = [part for kind in kinds for part in (nn.Conv2d(8, 8, 1), kind(8))]
    found = widths(nn.Sequential(nn.Conv2d(3, 8, 1), *parts, nn.Conv2d(8, 2, 1)))
    assert list(found.values()) == [8, 8, 4, 8, 8]


def test_layer_norm_and_attention() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = Layers(8), Attention()
            self.wide, self.back, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.head(x + self.back(self.wide(self.norm(x)).relu()))

    assert widths(Block(), torch.rand(2, 5, 8)) == {"wide": 16}
