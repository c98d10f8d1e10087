"""The shared parts of the generators: random fields, filters, and the conversion to images with masks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsekern.recipes.data import Split

CHUNK = 16  # images rendered at once; bounds the memory
SMALLEST = 16  # pixels along an edge

Render = Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]


def uniform(random: torch.Generator, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """Uniform numbers in `[low, high)`, float32 of `shape`."""
    return low + (high - low) * torch.rand(shape, generator=random)


def clouds(random: torch.Generator, count: int, size: int, cells: int) -> Tensor:
    """Smooth random fields in [0, 1], `[N, 1, S, S]`, with `cells` bumps along an edge."""
    coarse = torch.rand(count, 1, cells + 1, cells + 1, generator=random)
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True).clamp(0, 1)


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of `[N, 1, S, S]` with `sigma` in pixels; the edge pixels are repeated outwards."""
    reach = min(max(1, math.ceil(2.5 * sigma)), x.shape[-1] - 1)
    line = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (line / max(sigma, 0.1)).square())
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="replicate"), kernel)
    return F.conv2d(F.pad(x, (0, 0, reach, reach), mode="replicate"), kernel.transpose(2, 3))


def grid(size: int) -> tuple[Tensor, Tensor]:
    """Centres of the pixels: y `[S, 1]` and x `[1, S]`, in pixels."""
    line = torch.arange(size, dtype=torch.float32) + 0.5
    return line.view(-1, 1), line.view(1, -1)


class Generator:
    """Makes images with masks, of one kind; a decorator for the function that draws them.

    Args:
        render: `(count, size, random)` to images float32 `[N, 3, S, S]` in [0, 1] and classes `[N, S, S]`.
    """

    def __init__(self, render: Render) -> None:
        self._render = render
        functools.update_wrapper(self, render)

    def __call__(self, count: int, size: int = 128, seed: int = 0) -> Split:
        """`count` images with masks.

        The same arguments give the same images on the same machine; another seed gives other images.

        Args:
            count: number of images, at least 1.
            size: height and width of the images in pixels, at least 16.
            seed: seed of all random numbers.

        Raises:
            ValueError: `count` or `size` is too small.
        """
        for name, value, least in (("count", count, 1), ("size", size, SMALLEST)):
            if not isinstance(value, (int, np.integer)) or value < least:
                raise ValueError(f"{name}: got {value!r}, expected a whole number of at least {least}")
        random = torch.Generator().manual_seed(seed)
        starts = range(0, count, CHUNK)
        parts = [self._render(min(CHUNK, count - start), size, random) for start in starts]
        images = torch.cat([image.clamp(0, 1).mul(255).round().to(torch.uint8) for image, _ in parts])
        pixels = images.movedim(1, -1).contiguous().numpy()
        labels = torch.cat([mask.to(torch.uint8) for _, mask in parts]).numpy()
        return Split.from_arrays([f"{i:04d}.png" for i in range(count)], list(pixels), list(labels))
