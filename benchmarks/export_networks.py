"""Small networks of many kinds, each with an example, that exports are checked with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sparsekern.recipes._torchvision  # noqa: F401  # has to come before torchvision
from benchmarks.networks import randomise
from sparsekern.recipes.models import UNet, lraspp_mobilenetv3

# isort: split

from torchvision import models as tv


@dataclass(frozen=True)
class Case:
    """A network and how it is exported.

    Attributes:
        make: makes the network.
        shapes: shapes of its inputs.
        dynamic: as for ``sparsekern.export``.
    """

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = ((1, 3, 32, 32),)
    dynamic: bool | str = True

    def network(self) -> nn.Module:
        """The network in evaluation mode, with norms as after a training."""
        torch.manual_seed(0)
        model = self.make()
        randomise(model)
        return model.eval()

    def example(self) -> tuple[Tensor, ...]:
        """Fixed noise for every input."""
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(shape, generator=generator) for shape in self.shapes)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    """Convolution, batch norm and ReLU."""
    options.setdefault("padding", kernel // 2)
    layer = nn.Conv2d(inputs, outputs, kernel, bias=False, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Dense(nn.Module):
    """Two dense layers, norm and activation before each convolution, joined by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        blocks = [nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), *conv(c, 8, 1)[:2], nn.ReLU()) for c in (8, 12)]
        self.blocks = nn.ModuleList(blocks)
        self.grow = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1) for _ in blocks)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        for block, grow in zip(self.blocks, self.grow, strict=True):
            x = torch.cat([x, grow(block(x))], 1)
        return self.head(x.mean((2, 3)))


def depthwise() -> nn.Module:
    """Depthwise separable convolutions with Hardswish and dropout."""
    layers = [
        *conv(3, 8, stride=2),
        *conv(8, 8, groups=8),
        *conv(8, 16, 1)[:2],
        nn.Hardswish(),
        nn.Dropout(0.2),
    ]
    return nn.Sequential(*layers, nn.Conv2d(16, 2, 1))


def transposed() -> nn.Module:
    """Transposed convolutions with batch norms: plain, grouped and depthwise."""
    layers: list[nn.Module] = [*conv(3, 8)]
    for outputs, groups in ((8, 1), (8, 2), (8, 8)):
        layers += [
            nn.ConvTranspose2d(8, outputs, 2, stride=2, groups=groups),
            nn.BatchNorm2d(outputs),
            nn.SiLU(),
        ]
    return nn.Sequential(*layers, nn.Conv2d(8, 1, 1))


def grouped() -> nn.Module:
    """Grouped convolutions, one with another number of filters per group."""
    return nn.Sequential(*conv(3, 8), *conv(8, 16, groups=4), *conv(16, 8, groups=2), nn.Conv2d(8, 2, 1))


class SqueezeExcite(nn.Module):
    """A residual block whose channels are scaled by a squeeze-and-excitation branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv(3, 16), nn.Sequential(*conv(16, 16)[:2])
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1), nn.Sigmoid()
        )
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.body(x)
        return self.head(torch.relu(x + y * self.gate(y)))


class TwoInputs(nn.Module):
    """An image and numbers about it."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.numbers = conv(3, 8), nn.Linear(4, 8)
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, image: Tensor, numbers: Tensor) -> Tensor:
        return self.head(self.image(image).mean((2, 3)) * torch.sigmoid(self.norm(self.numbers(numbers))))


class Outputs(nn.Module):
    """A dict of a tensor, a tuple and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.main, self.side = conv(3, 8), nn.Conv2d(8, 2, 1), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.stem(x)
        return {"out": self.main(x), "parts": (self.side(x), x.mean((2, 3))), "list": [x.amax(1)]}


CASES: dict[str, Case] = {
    "unet": Case(lambda: UNet(3, 1, width=4, depth=2)),
    "unet-bilinear": Case(lambda: UNet(3, 3, width=4, depth=2, decoder="bilinear")),
    "mobilenetv3-seg": Case(
        lambda: lraspp_mobilenetv3("small", classes=2, multiplier=0.25), ((1, 3, 64, 64),)
    ),
    "resnet": Case(lambda: tv.ResNet(tv.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5, width_per_group=8)),
    "densenet": Case(Dense),
    "depthwise": Case(depthwise),
    "transposed": Case(transposed, ((1, 3, 8, 8),)),
    "grouped": Case(grouped),
    "squeeze-excite": Case(SqueezeExcite),
    "vit": Case(lambda: tv.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5), dynamic="batch"),
    "outputs": Case(Outputs),
    "two-inputs": Case(TwoInputs, ((2, 3, 16, 16), (2, 4))),
}
"""Every case by name."""
