"""Common networks: traced in full, exact, with exact costs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from graph.exactness import check
from torch import Tensor, nn
from torchvision_models import models, torchvision

from sparsekern.recipes.models import UNet

resnet, mobilenetv3 = torchvision.models.resnet, torchvision.models.mobilenetv3


def vgg() -> nn.Module:
    layers = torchvision.models.vgg.make_layers([16, "M", 32, "M", 512, "M"], batch_norm=True)
    net = torchvision.models.vgg.VGG(layers, init_weights=False)
    net.classifier = nn.Sequential(nn.Linear(512 * 49, 24), nn.ReLU(), nn.Linear(24, 5))
    return net


def swin() -> nn.Module:
    return torchvision.models.swin_transformer.SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5
    )


def vit() -> nn.Module:
    return torchvision.models.vision_transformer.VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=5)


def convnext() -> nn.Module:
    setting = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.convnext.ConvNeXt([setting(16, 32, 2), setting(32, None, 1)], num_classes=5)


def googlenet() -> nn.Module:
    return models.googlenet(weights=None, init_weights=False, aux_logits=True, num_classes=5)


def lraspp() -> nn.Module:
    return models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)


# Name: (network, least share of its parameters that can go).
NETWORKS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "unet": (lambda: UNet(3, 2, width=8, depth=3), 0.98),
    "unet_bilinear": (lambda: UNet(3, 1, width=8, depth=3, decoder="bilinear"), 0.98),
    "resnet18": (lambda: models.resnet18(weights=None), 0.99),
    "bottlenecks": (lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 2, 1], 5), 0.99),
    "resnext": (lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], 5, groups=8, width_per_group=8), 0.98),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 3), 16, num_classes=5), 0.95),
    "vgg": (vgg, 0.98),
    "mobilenet_v2": (lambda: models.mobilenet_v2(weights=None, width_mult=0.25, num_classes=5), 0.98),
    "mobilenet_v3_small": (lambda: models.mobilenet_v3_small(weights=None), 0.98),
    "lraspp": (lraspp, 0.98),
    "shufflenet": (lambda: models.shufflenet_v2_x0_5(weights=None, num_classes=5), 0.9),
    "squeezenet": (lambda: models.squeezenet1_1(weights=None, num_classes=5), 0.95),
    "googlenet": (googlenet, 0.98),
    "convnext": (convnext, 0.6),
    "swin": (swin, 0.3),
    "vit": (vit, 0.15),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_is_exact(name: str) -> None:
    torch.manual_seed(0)
    make, share = NETWORKS[name]
    graph = check(make(), [torch.randn(2, 3, 64, 64)])
    least = np.zeros(graph.num_channels, bool)
    least[[group.channels[0] for group in graph.groups]] = True
    full = graph.cost(np.ones_like(least))
    assert graph.cost(least).params < (1 - share) * full.params


_MEMORY = """
import resource, torch
from sparsekern.graph import trace
from sparsekern.recipes.models import UNet
model = UNet(3, 1, width=64, depth=4)
assert sum(p.numel() for p in model.parameters()) > 30e6
trace(torch.nn.Conv2d(3, 4, 1), torch.randn(1, 3, 8, 8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
trace(model, torch.randn(1, 3, 256, 256))
raise SystemExit(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 60 * 1024)
"""


def test_takes_no_memory() -> None:
    """31 million parameters take 120 MB; their fake copy takes none."""
    assert subprocess.run([sys.executable, "-c", _MEMORY], check=False).returncode == 0


def test_auxiliary_heads_shrink_with_the_network() -> None:
    """Layers that run in training mode only are part of the graph, but not of the MACs."""

    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 8, 3)
            self.head = nn.Conv2d(8, 2, 1)
            self.aux = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            x = self.body(x).relu()
            return (self.head(x), self.aux(x)) if self.training else (self.head(x),)

    graph = check(WithHead(), [torch.randn(2, 3, 8, 8)])
    assert ("aux.weight", 1) in graph.groups[0].consumers
    assert graph.tensors["aux.weight"].channels[1] is not None
