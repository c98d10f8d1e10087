"""Microscopy-like images of cell nuclei, generated with their masks.

Nuclei are ellipses with uneven outline, brightness and texture on a background with gradient and
haze; debris that is not a nucleus, blur and noise make the task one that has to be learnt. A third
of the images is stained tissue in bright light (dark violet on light pink), the others fluoresce.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import Split

NUCLEI = 26  # drawn per image; a random share of them lies outside of it or is left out
DEBRIS = 14
CHUNK = 16  # images generated at once: bounds the memory


def generate(count: int, size: int = 128, seed: int = 0) -> Split:
    """`count` images of `size` x `size` pixels with masks (1 = nucleus).

    The same arguments give the same images on the same machine; different seeds, different ones.
    """
    random = torch.Generator().manual_seed(seed)
    parts = [_render(min(CHUNK, count - start), size, random) for start in range(0, count, CHUNK)]
    images = torch.cat([image for image, _ in parts]).movedim(1, -1).contiguous().numpy()
    masks = torch.cat([mask for _, mask in parts]).numpy()
    return Split.from_arrays([f"{i:04d}.png" for i in range(count)], list(images), list(masks))


def _render(count: int, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images uint8 `[N, 3, S, S]` and masks uint8 `[N, S, S]`."""
    typical = size * _uniform(random, (count, 1), 0.035, 0.085)
    inside, rim = _ellipses(count, NUCLEI, size, typical, random)
    present = _uniform(random, (count, NUCLEI), 0, 1) < _uniform(random, (count, 1), 0.3, 1.0)
    inside = inside * present[:, :, None, None]
    mask = (inside > 0.5).any(1)

    brightness = _uniform(random, (count, NUCLEI, 1, 1), 0.35, 1.0)
    nuclei = (inside * brightness * rim).amax(1, keepdim=True)
    nuclei = nuclei * (0.85 + 0.3 * _clouds(random, count, size, size // 6))
    spots, _ = _ellipses(count, DEBRIS, size, typical * 0.22, random)
    debris = (spots * _uniform(random, (count, DEBRIS, 1, 1), 0.0, 0.6)).amax(1, keepdim=True)

    haze = _blur(nuclei, size * 0.06) * _uniform(random, (count, 1, 1, 1), 0.0, 0.8)
    gradient = _clouds(random, count, size, 2) * _uniform(random, (count, 1, 1, 1), 0.05, 0.3)
    signal = torch.maximum(nuclei, debris) + 0.5 * haze + gradient
    blurred = _blur(signal, size * 0.012)
    share = _uniform(random, (count, 1, 1, 1), 0.2, 1.0)
    signal = (share * blurred + (1 - share) * _blur(signal, size * 0.004)).clamp(0, 1.5)

    level = _uniform(random, (count, 1, 1, 1), 0.02, 0.09)
    noise = torch.randn(count, 3, size, size, generator=random)
    colour = _fluorescence(signal, random)
    stained = _uniform(random, (count, 1, 1, 1), 0, 1) < 1 / 3
    colour = torch.where(stained, _stain(signal, random), colour)
    colour = colour + noise * level * (0.3 + colour.clamp(0, 1)).sqrt()
    return colour.clamp(0, 1).mul(255).round().to(torch.uint8), mask.to(torch.uint8)


def _uniform(random: torch.Generator, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=random)


def _ellipses(
    count: int, each: int, size: int, typical: Tensor, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Coverage in [0, 1] and shading towards the rim, both `[N, each, S, S]`.

    `typical` `[N, 1]` is the radius in pixels that those of an image scatter around.
    """
    shape = (count, each)
    centre = _uniform(random, (2, *shape, 1, 1), -0.05 * size, 1.05 * size)
    radius = typical * torch.exp(0.25 * torch.randn(shape, generator=random))
    aspect = _uniform(random, shape, 1.0, 1.7).sqrt()
    angle = _uniform(random, (3, *shape), 0, 2 * math.pi)
    bumps = _uniform(random, (2, *shape), 0.0, 0.12)

    grid = torch.arange(size, dtype=torch.float32) + 0.5
    y, x = grid.view(1, 1, -1, 1) - centre[0], grid.view(1, 1, 1, -1) - centre[1]
    turn, two, three = (a[:, :, None, None] for a in angle)
    u = (x * turn.cos() + y * turn.sin()) / (radius * aspect)[:, :, None, None]
    v = (y * turn.cos() - x * turn.sin()) / (radius / aspect)[:, :, None, None]
    theta = torch.atan2(v, u)
    outline = 1 + bumps[0, ..., None, None] * torch.cos(2 * theta + two)
    outline = outline + bumps[1, ..., None, None] * torch.cos(3 * theta + three)
    distance = torch.hypot(u, v) / outline
    edge = (1 - distance) * radius[:, :, None, None]  # pixels from the rim, positive inside
    return (edge + 0.5).clamp(0, 1), 1 - 0.35 * distance.clamp(0, 1).square()


def _clouds(random: torch.Generator, count: int, size: int, cells: int) -> Tensor:
    """Smooth random fields in [0, 1], `[N, 1, S, S]`, with `cells` bumps along an edge."""
    coarse = torch.rand(count, 1, cells + 1, cells + 1, generator=random)
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True).clamp(0, 1)


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of `[N, 1, S, S]`, `sigma` in pixels, the edge continued outwards."""
    reach = min(max(1, math.ceil(2.5 * sigma)), x.shape[-1] - 1)
    line = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (line / max(sigma, 0.1)).square())
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="replicate"), kernel)
    return F.conv2d(F.pad(x, (0, 0, reach, reach), mode="replicate"), kernel.transpose(2, 3))


def _fluorescence(signal: Tensor, random: torch.Generator) -> Tensor:
    """Light on black, `[N, 3, S, S]`: grey, in every other image tinted."""
    count = signal.shape[0]
    floor = _uniform(random, (count, 1, 1, 1), 0.01, 0.1)
    gain = _uniform(random, (count, 1, 1, 1), 0.35, 0.95)
    tint = _uniform(random, (count, 3, 1, 1), 0.25, 1.0)
    grey = _uniform(random, (count, 1, 1, 1), 0, 1) < 0.5
    return floor + gain * signal * torch.where(grey, torch.ones(()), tint)


def _stain(signal: Tensor, random: torch.Generator) -> Tensor:
    """Dark violet on light pink, `[N, 3, S, S]`: light is absorbed exponentially."""
    count = signal.shape[0]
    paper = torch.tensor([0.93, 0.85, 0.90]).view(1, 3, 1, 1)
    absorbed = torch.tensor([1.1, 1.6, 0.7]).view(1, 3, 1, 1)
    paper = paper * _uniform(random, (count, 1, 1, 1), 0.85, 1.05)
    absorbed = absorbed * _uniform(random, (count, 3, 1, 1), 0.7, 1.2)
    return paper * torch.exp(-absorbed * signal)
