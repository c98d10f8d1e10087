"""Six small networks of different kinds, as examples of common ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from compact.networks import mask, randomise
from torch import Tensor, nn
from torchvision_models import models

from sparsekern.compact import Plan, compact, make_plan
from sparsekern.graph import trace
from sparsekern.recipes.models import UNet
from sparsekern.recipes.models.mobilenetv3 import Block, ConvNormAct, InvertedResidual

SIZE = 32

KINDS: dict[str, Callable[[], nn.Module]] = {
    "unet": lambda: UNet(3, 2, width=4, depth=2),
    "mobilenet": lambda: nn.Sequential(
        ConvNormAct(3, 16, 3, stride=2, activation=nn.Hardswish),
        InvertedResidual(16, Block(3, 32, 16, True, True, 1), 1.0, 1),
        InvertedResidual(16, Block(5, 48, 24, False, False, 2), 1.0, 1),
        nn.Conv2d(24, 2, 1),
        nn.UpsamplingBilinear2d(scale_factor=4),
    ),
    "resnet": lambda: models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4),
    "densenet": lambda: models.DenseNet(8, (2, 2), 16, num_classes=4),
    "shufflenet": lambda: models.ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 64], num_classes=4),
    "vit": lambda: models.VisionTransformer(SIZE, 16, 2, 4, 32, 64, num_classes=4),
}


def image(seed: int = 0, count: int = 2) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def halved(kind: str) -> tuple[nn.Module, Plan, nn.Module]:
    """A network of that kind, a plan that leaves about half of every group, and the smaller network."""
    torch.manual_seed(0)
    model = randomise(KINDS[kind]()).eval()
    for parameter in model.parameters():
        if not parameter.any():  # heads and shifts that start at zero would hide every difference
            nn.init.normal_(parameter, std=0.1)
    graph = trace(model, image())
    random = np.random.default_rng(0)
    kept = np.zeros(graph.num_channels, bool)
    for group in graph.groups:
        width = (len(group.channels) + 1) // 2
        kept[random.permutation(group.channels)[:width]] = True
    mask(model, graph, kept)
    plan = make_plan(graph, kept)
    return model, plan, compact(model, plan)
