"""Microscopy-like images of cell nuclei, Generator with their masks.

Nuclei are ellipses with uneven outline, brightness and texture on a background with gradient and haze.
Debris, blur and noise make the task non-trivial. A third of the images shows stained tissue in bright light
(dark violet on light pink), the others show fluorescence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsekern.recipes.synthetic.fields import Generator, blur, clouds, uniform

NUCLEI = 26  # drawn per image; a random share of them lies outside the image or is left out
DEBRIS = 14


@Generator
def generate(count: int, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images float32 `[N, 3, S, S]` and masks `[N, S, S]` (1 = nucleus)."""
    typical = size * uniform(random, (count, 1), 0.035, 0.085)
    inside, rim = _ellipses(count, NUCLEI, size, typical, random)
    present = uniform(random, (count, NUCLEI), 0, 1) < uniform(random, (count, 1), 0.3, 1.0)
    inside = inside * present[:, :, None, None]
    mask = (inside > 0.5).any(1)

    brightness = uniform(random, (count, NUCLEI, 1, 1), 0.35, 1.0)
    nuclei = (inside * brightness * rim).amax(1, keepdim=True)
    nuclei = nuclei * (0.85 + 0.3 * clouds(random, count, size, size // 6))
    spots, _ = _ellipses(count, DEBRIS, size, typical * 0.22, random)
    debris = (spots * uniform(random, (count, DEBRIS, 1, 1), 0.0, 0.6)).amax(1, keepdim=True)

    haze = blur(nuclei, size * 0.06) * uniform(random, (count, 1, 1, 1), 0.0, 0.8)
    gradient = clouds(random, count, size, 2) * uniform(random, (count, 1, 1, 1), 0.05, 0.3)
    signal = torch.maximum(nuclei, debris) + 0.5 * haze + gradient
    blurred = blur(signal, size * 0.012)
    share = uniform(random, (count, 1, 1, 1), 0.2, 1.0)
    signal = (share * blurred + (1 - share) * blur(signal, size * 0.004)).clamp(0, 1.5)

    level = uniform(random, (count, 1, 1, 1), 0.02, 0.09)
    noise = torch.randn(count, 3, size, size, generator=random)
    colour = _fluorescence(signal, random)
    stained = uniform(random, (count, 1, 1, 1), 0, 1) < 1 / 3
    colour = torch.where(stained, _stain(signal, random), colour)
    colour = colour + noise * level * (0.3 + colour.clamp(0, 1)).sqrt()
    return colour, mask


def _ellipses(
    count: int, each: int, size: int, typical: Tensor, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Coverage in [0, 1] and shading towards the rim, both `[N, each, S, S]`.

    `typical` `[N, 1]` is the typical radius in an image in pixels; the radii scatter around it.
    """
    shape = (count, each)
    centre = uniform(random, (2, *shape, 1, 1), -0.05 * size, 1.05 * size)
    radius = typical * torch.exp(0.25 * torch.randn(shape, generator=random))
    aspect = uniform(random, shape, 1.0, 1.7).sqrt()
    angle = uniform(random, (3, *shape), 0, 2 * math.pi)
    bumps = uniform(random, (2, *shape), 0.0, 0.12)

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


def _fluorescence(signal: Tensor, random: torch.Generator) -> Tensor:
    """Fluorescence, light on black, `[N, 3, S, S]`: grey, and tinted in every second image."""
    count = signal.shape[0]
    floor = uniform(random, (count, 1, 1, 1), 0.01, 0.1)
    gain = uniform(random, (count, 1, 1, 1), 0.35, 0.95)
    tint = uniform(random, (count, 3, 1, 1), 0.25, 1.0)
    grey = uniform(random, (count, 1, 1, 1), 0, 1) < 0.5
    return floor + gain * signal * torch.where(grey, torch.ones(()), tint)


def _stain(signal: Tensor, random: torch.Generator) -> Tensor:
    """Stained tissue, dark violet on light pink, `[N, 3, S, S]`, with exponential absorption of light."""
    count = signal.shape[0]
    paper = torch.tensor([0.93, 0.85, 0.90]).view(1, 3, 1, 1)
    absorbed = torch.tensor([1.1, 1.6, 0.7]).view(1, 3, 1, 1)
    paper = paper * uniform(random, (count, 1, 1, 1), 0.85, 1.05)
    absorbed = absorbed * uniform(random, (count, 3, 1, 1), 0.7, 1.2)
    return paper * torch.exp(-absorbed * signal)
