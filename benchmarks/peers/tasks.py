"""The networks that all tools train and prune, and their generated data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import sparsekern.recipes._torchvision  # noqa: F401  # has to come before torchvision
from sparsekern.recipes.batches import Batches
from sparsekern.recipes.data import normalise
from sparsekern.recipes.metrics import SegmentationLoss
from sparsekern.recipes.models import UNet
from sparsekern.recipes.synthetic import KINDS, splits

# isort: split

from torchvision.models.resnet import Bottleneck, ResNet

Batch = tuple[Tensor, Tensor]
DIRECTIONS = 8


@dataclass(frozen=True)
class Task:
    """A network to train, its data, and the measure of its quality.

    Attributes:
        make: makes the network with random weights; its output layer is the attribute ``head``.
        head: name of the output layer.
        example: one input ``[1, C, H, W]``.
        batch: the batch of a step.
        loss: of outputs and targets.
        quality: of a network in evaluation mode, in [0, 1]; larger is better.
        measure: the name of the quality.
    """

    make: Callable[[], nn.Module]
    head: str
    example: Tensor
    batch: Callable[[int], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    quality: Callable[[nn.Module], float]
    measure: str


def stripes(count: int, seed: int) -> Batch:
    """Stripes in noise, float32 ``[count, 3, 32, 32]``, and their directions, int64 ``[count]``."""
    random = torch.Generator().manual_seed(seed)
    classes = torch.randint(DIRECTIONS, (count,), generator=random)
    angles = (classes * math.pi / DIRECTIONS)[:, None, None]
    phases = 2 * math.pi * torch.rand(count, 1, 1, generator=random)
    line = torch.arange(32.0)
    waves = torch.sin(0.8 * (line[:, None] * angles.sin() + line[None, :] * angles.cos()) + phases)
    return waves[:, None] + 2 * torch.randn(count, 3, 32, 32, generator=random), classes


def resnet(seed: int) -> Task:
    """A small ResNet of bottleneck blocks that tells directions of stripes apart."""
    images, classes = stripes(1000, seed=10**6 + seed)

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        return float((model.eval()(images).argmax(1) == classes).float().mean())

    return Task(
        make=lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=DIRECTIONS, width_per_group=16),
        head="fc",
        example=images[:1],
        batch=lambda step: stripes(32, seed=1000 * seed + step),
        loss=nn.CrossEntropyLoss(),
        quality=accuracy,
        measure="accuracy",
    )


def unet(seed: int) -> Task:
    """A UNet that finds generated vessels."""
    train, test = splits(KINDS["vessels"], train=128, test=32, size=64, seed=100 * seed)
    batches, loss = Batches(train, batch=8, crop=64, seed=seed), SegmentationLoss()
    images = torch.cat([normalise(test.image(i)[None]) for i in range(len(test))])
    masks = torch.stack([torch.from_numpy(test.mask(i)) for i in range(len(test))]) == 1

    @torch.no_grad()
    def dice(model: nn.Module) -> float:
        found = model.eval()(images)[:, 0] > 0
        return float(2 * (found & masks).sum() / (found.sum() + masks.sum()).clamp_min(1))

    return Task(
        make=lambda: UNet(3, 1, width=16, depth=3),
        head="head",
        example=images[:1],
        batch=batches,
        loss=loss,
        quality=dice,
        measure="Dice",
    )


TASKS: dict[str, Callable[[int], Task]] = {"unet": unet, "resnet": resnet}
"""Every task by name: a function of the seed."""
