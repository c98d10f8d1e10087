"""The measured networks, and lists of tensors without a network."""

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
    """A network and the batch of its iterations.

    Attributes:
        make: makes the network with random weights.
        images: number of images of a batch, with 3 channels.
        edge: height and width of the images in pixels.
    """

    make: Callable[[], nn.Module]
    images: int = 2
    edge: int = 128

    def batch(self) -> Tensor:
        """Fixed noise ``[images, 3, edge, edge]``, float32."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.images, 3, self.edge, self.edge, generator=generator)


NETWORKS: dict[str, Network] = {
    "unet-2m": Network(lambda: UNet(3, 1, width=16)),
    "unet-31m": Network(lambda: UNet(3, 1, width=64), edge=64),
    "mobilenetv3-seg": Network(lambda: lraspp_mobilenetv3("large", classes=1)),
    "resnet50": Network(ResNet50),
}

SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    # One large tensor as long as an array of the stream: no list overhead, and larger than caches.
    "flat-17m": ((ELEMENTS,),),
    # Tiny tensors: they show the overhead of a call beside its kernels.
    "tiny-174": ((4,),) * 174,
}


@functools.cache
def graph(name: str) -> ChannelGraph:
    """The channel graph of a network, traced once per process."""
    network = NETWORKS[name]
    return trace(network.make(), network.batch())
