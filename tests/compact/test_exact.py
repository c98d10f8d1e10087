"""Masked and compact networks give equal outputs, on the usual architectures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from compact.networks import mask, randomise
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision_models import models

from sparsekern.compact import compact, load, make_plan, save, verify
from sparsekern.graph import ChannelGraph, dry_run, trace
from sparsekern.recipes.models.unet import UNet


def lraspp() -> nn.Module:
    return models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)


# Factory, and the smallest image side that leaves a pixel in the last feature map.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (models.resnet18, 32),
    "resnet50": (models.resnet50, 32),
    "densenet121": (models.densenet121, 32),
    "vgg16_bn": (lambda: models.vgg16_bn(init_weights=False), 32),
    "mobilenet_v3_large": (models.mobilenet_v3_large, 32),
    "lraspp_mobilenet_v3_large": (lraspp, 64),
    "unet, transposed": (lambda: UNet(3, 2, width=16, depth=3, decoder="transposed"), 32),
    "unet, bilinear": (lambda: UNet(3, 2, width=16, depth=3, decoder="bilinear"), 32),
}


def nested(graph: ChannelGraph, shares: list[float]) -> Iterator[np.ndarray]:
    """Random nested sets of channels to keep, smaller with each share, at least one of every group."""
    order = np.random.default_rng(0).random(graph.num_channels)
    for group in graph.groups:
        order[group.channels[np.argmin(order[group.channels])]] = 0
    for share in shares:
        yield order < share


@pytest.mark.parametrize(("factory", "side"), NETWORKS.values(), ids=NETWORKS)
def test_masked_and_compact_networks_agree(factory: Callable[[], nn.Module], side: int) -> None:
    torch.manual_seed(0)
    model = randomise(factory().to(torch.float64))
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    graph = trace(model, x)
    assert dry_run(model, graph, x) is graph
    for kept in nested(graph, [0.5, 0.2, 0.05]):
        mask(model, graph, kept)
        small = compact(model, make_plan(graph, kept))
        assert verify(model, small, x) < 1e-12
        cost = graph.cost(kept)
        assert cost.params == sum(p.numel() for p in small.parameters())
        small.eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            small(x)
        assert 2 * cost.macs == counter.get_total_flops()


def test_channels_of_a_compact_network_are_found_and_removed_again(tmp_path: Path) -> None:
    def unet() -> nn.Module:
        return UNet(3, 1, width=16, depth=2)

    torch.manual_seed(0)
    model = randomise(unet().to(torch.float64))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    small = model
    for _ in range(2):
        graph = trace(small, x)
        (kept,) = nested(graph, [0.5])
        mask(small, graph, kept)
        smaller = compact(small, make_plan(graph, kept))
        assert verify(small, smaller, x) < 1e-12
        small = smaller
    save(small, tmp_path / "model")
    assert verify(small, load(unet(), tmp_path / "model"), x) == 0
