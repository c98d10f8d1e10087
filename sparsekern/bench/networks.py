"""The networks whose parameters and iterations are measured, and lists of tensors that are no network's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsekern.bench.resnet import ResNet50
from sparsekern.bench.stream import ELEMENTS
from sparsekern.graph import ChannelGraph, trace
from sparsekern.recipes.models import UNet, lraspp_mobilenetv3


@dataclass(frozen=True)
class Network:
    """A network, and the batch that an iteration is made with.

    Attributes:
        make: gives one, with random weights.
        images: how many images of 3 channels.
        edge: their height and width in pixels.
    """

    make: Callable[[], nn.Module]
    images: int = 2
    edge: int = 128

    def batch(self) -> Tensor:
        """``[images, 3, edge, edge]`` of fixed noise, float32."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.images, 3, self.edge, self.edge, generator=generator)


NETWORKS: dict[str, Network] = {
    "unet-2m": Network(lambda: UNet(3, 1, width=16)),
    "unet-31m": Network(lambda: UNet(3, 1, width=64), edge=64),
    "mobilenetv3-seg": Network(lambda: lraspp_mobilenetv3("large", classes=1)),
    "resnet50": Network(ResNet50),
}

SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    # One large tensor: no list to walk, nothing that fits a cache; its size is the stream's.
    "flat-17m": ((ELEMENTS,),),
    # Hardly any elements: what a call costs beside its kernels.
    "tiny-174": ((4,),) * 174,
}


@functools.cache
def graph(name: str) -> ChannelGraph:
    """The channels of a network; traced once in a process."""
    network = NETWORKS[name]
    return trace(network.make(), network.batch())
