"""Electron-microscopy-like sections of tissue, Generator with the masks of its cell membranes.

Cells are regions around random centres with curved borders. Their membranes are dark lines of uneven width,
which vanish where the cut runs along them; the mask continues there. Mitochondria, vesicles and rods
inside the cells are as dark as a membrane and not part of the mask.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsekern.recipes.synthetic.fields import Generator, blur, clouds, grid, uniform

REFERENCE = 96  # pixels; widths and lengths below are those of an image of this size
CELLS = 34  # centres per image; some lie outside the image
MITOCHONDRIA, VESICLES = 9, 26
RIM = 1.6  # thickness of the rim of a mitochondrion, in pixels of the reference


@Generator
def generate(count: int, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images float32 `[N, 3, S, S]`, all channels equal, and masks `[N, S, S]` (1 = membrane)."""
    scale = size / REFERENCE
    place = _warped(random, count, size)
    border, cell = _cells(random, count, size, place)
    half = scale * (0.75 + 0.75 * clouds(random, count, size, 5))
    mask = (border < half)[:, 0]

    # A membrane is wide and pale, or invisible, where the cut runs along it.
    gap = torch.sigmoid((clouds(random, count, size, 9) - 0.68) / 0.04)
    line = (half + 0.6 * scale - border).clamp(0, 1) * (1 - gap)
    smear = torch.exp(-(border / (3.5 * scale)).square()) * gap * 0.35
    tone = cell + 0.07 * (clouds(random, count, size, size // 3) - 0.5)
    tone = tone + 0.12 * (clouds(random, count, size, size // 8) - 0.5)
    organelles = _organelles(random, count, size, place, border)
    darkness = torch.maximum(torch.maximum(0.5 * line, smear), organelles)
    grey = tone * (1 - darkness)

    sharpness = uniform(random, (count, 1, 1, 1), 0.0, 1.0)
    grey = sharpness * blur(grey, 0.45 * scale) + (1 - sharpness) * blur(grey, 0.9 * scale)
    noise = torch.randn(count, 1, size, size, generator=random)
    level = uniform(random, (count, 1, 1, 1), 0.03, 0.08)
    grey = grey + level * (0.6 * noise + 0.9 * blur(noise, 0.6 * scale))
    light = 0.85 + 0.3 * clouds(random, count, size, 1)
    return (grey * light).expand(-1, 3, -1, -1), mask


def _warped(random: torch.Generator, count: int, size: int) -> tuple[Tensor, Tensor]:
    """y and x of the pixels, `[N, 1, S, S]`, distorted so that straight lines bend."""
    y, x = grid(size)
    strength = 0.17 * size
    return tuple(  # type: ignore[return-value]
        axis
        + strength * (clouds(random, count, size, 4) - 0.5)
        + 0.05 * size * clouds(random, count, size, 9)
        for axis in (y, x)
    )


def _cells(
    random: torch.Generator, count: int, size: int, place: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Distance to the nearest cell border in pixels, and brightness of the cells, both `[N, 1, S, S]`.

    A pixel belongs to the centre with the smallest distance minus the centre's radius. The radii give cells
    of different sizes with curved borders.
    """
    centre = uniform(random, (2, count, CELLS, 1, 1), -0.1 * size, 1.1 * size)
    radius = uniform(random, (count, CELLS, 1, 1), 0.0, 1.0).square() * 0.17 * size
    brightness = uniform(random, (count, CELLS), 0.5, 0.74)
    # A few cells are much darker.
    brightness = brightness - 0.14 * (uniform(random, (count, CELLS), 0, 1) < 0.15)
    away = torch.hypot(place[0] - centre[0], place[1] - centre[1])
    nearest, which = (away - radius).topk(2, dim=1, largest=False)
    ahead = nearest[:, 1:] - nearest[:, :1]
    # Near the border the difference divided by its slope is a distance in pixels. The slope is taken beside
    # the border, because the difference has a kink at the border.
    slope = F.max_pool2d(torch.hypot(*torch.gradient(ahead, dim=(2, 3))), 3, stride=1, padding=1)
    border = ahead / slope.clamp(min=0.3)
    own = brightness[:, :, None, None].expand(-1, -1, size, size).gather(1, which[:, :1])
    return border, own


def _organelles(
    random: torch.Generator, count: int, size: int, place: tuple[Tensor, Tensor], border: Tensor
) -> Tensor:
    """Darkness in [0, 1] of the objects inside cells, `[N, 1, S, S]`."""
    scale = size / REFERENCE
    body, rim = _blobs(random, count, size, MITOCHONDRIA, 2.6 * scale, 6.5 * scale, 2.2, place)
    cristae = clouds(random, count, size, size // 3)
    mitochondria = body.amax(1, keepdim=True) * (0.12 + 0.3 * cristae) + 0.42 * rim.amax(1, keepdim=True)
    body, rim = _blobs(random, count, size, VESICLES, 0.9 * scale, 2.2 * scale, 1.3, place)
    strength = uniform(random, (count, VESICLES, 1, 1), 0.1, 0.5)
    vesicles = (strength * (0.25 * body + rim)).amax(1, keepdim=True)
    # Objects are kept off the borders, where only the membrane lies.
    return torch.maximum(mitochondria, vesicles).clamp(0, 0.6) * (border / (2.5 * scale) - 0.7).clamp(0, 1)


def _blobs(
    random: torch.Generator,
    count: int,
    size: int,
    each: int,
    smallest: float,
    largest: float,
    longest: float,
    place: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Filled ellipses and their rims, both in [0, 1], `[N, each, S, S]`.

    Radii are between `smallest` and `largest` pixels, ratios of axes between 1 and `longest`.
    """
    shape = (count, each, 1, 1)
    centre = uniform(random, (2, *shape), 0, size)
    radius = uniform(random, shape, smallest, largest)
    aspect = uniform(random, shape, 1.0, longest).sqrt()
    angle = uniform(random, shape, 0, math.pi)
    present = uniform(random, shape, 0, 1) < uniform(random, (count, 1, 1, 1), 0.3, 1.0)
    y, x = place[0] - centre[0], place[1] - centre[1]
    u = (x * angle.cos() + y * angle.sin()) / aspect
    v = (y * angle.cos() - x * angle.sin()) * aspect
    edge = radius - torch.hypot(u, v)  # about the pixels to the rim, positive inside
    width = RIM * size / REFERENCE / 2
    rim = (1 - (edge / width).abs()).clamp(0, 1)
    return (edge + 0.5).clamp(0, 1) * present, rim * present
