"""The networks of the benchmarks, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import sparsekern.recipes._torchvision  # noqa: F401  # has to come before torchvision
from sparsekern.bench.networks import NETWORKS as TIMED
from sparsekern.recipes.models import UNet

# isort: split

from torchvision import models as tv

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{name: TIMED[name].make for name in ("unet-31m", "unet-2m", "mobilenetv3-seg")},
    "unet-8m": lambda: UNet(3, 1, width=32),
    "unet-2m-bilinear": lambda: UNet(3, 1, width=16, decoder="bilinear"),
    "mobilenet_v3_large": tv.mobilenet_v3_large,
    "resnet18": tv.resnet18,
    "resnet50": tv.resnet50,
    "densenet121": tv.densenet121,
    "vgg16_bn": tv.vgg16_bn,
}


def example(name: str, size: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    """An input of the network ``name``: ``[2, 3, size, size]`` of fixed noise."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Draw random statistics and affines of every norm, because ones and zeros would hide errors.

    Other parameters that start at a constant are drawn, too: biases, scales of layers, position embeddings.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=torch.float64) * (high - low) + low

    done: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            module.running_mean.copy_(uniform(module.running_mean, -0.5, 0.5))
            module.running_var.copy_(uniform(module.running_var, 0.5, 2.0))
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.affine:
            module.weight.copy_(uniform(module.weight, 0.5, 1.5))
            module.bias.copy_(uniform(module.bias, -0.5, 0.5))
            done |= {id(module.weight), id(module.bias)}
    for name, parameter in model.named_parameters():
        constant = parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all())
        if id(parameter) not in done and (parameter.ndim <= 1 or constant):
            low, high = (-0.5, 0.5) if "bias" in name or parameter.ndim > 1 else (0.5, 1.5)
            parameter.copy_(uniform(parameter, low, high))
