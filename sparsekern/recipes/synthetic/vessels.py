"""Retina images, Generator with the masks of their vessels.

Vessels are thin branching trees on 3 to 8 % of the pixels. Their contrast fades along the branches and across
the field down to the noise, while the mask follows them to their ends. Wide faint vessels of the layer
behind, haemorrhages and exudates are not part of the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsekern.recipes.synthetic.fields import Generator, blur, clouds, grid, uniform

REFERENCE = 96  # pixels; widths and lengths below are those of an image of this size
STRIDE = 0.6  # distance of two points of a vessel, in pixels of the reference
TREES = 4
THICKEST, THINNEST = 1.5, 0.55  # radius in pixels of the reference
BRANCHING = 0.022  # probability of a branch at each point
LEAST_SHARE, MOST_SHARE = 0.035, 0.085  # bounds of the share of pixels that vessels fill
SPOTS = 10  # haemorrhages and exudates

# Absorption of red, green and blue light by blood.
ABSORPTION = (0.3, 1.0, 0.75)


@Generator
def generate(count: int, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images float32 `[N, 3, S, S]` and masks `[N, S, S]` (1 = vessel)."""
    disc = uniform(random, (2, count), -0.1, 1.1) * size
    points = _grow(count, size, disc.numpy(), _numpy_generator(random))
    depth, mask = _draw(points, count, size)
    # The contrast varies over the image, and a part of every image has almost none.
    depth = depth * (0.2 + 1.0 * clouds(random, count, size, 2))
    depth = depth * uniform(random, (count, 1, 1, 1), 0.7, 1.2)
    depth = blur(depth, size * 0.005)

    behind = 0.28 * _ridges(random, count, size) * uniform(random, (count, 1, 1, 1), 0.2, 1.0)
    dark, bright = _spots(random, count, size)
    absorbed = depth + behind + dark
    absorption = torch.tensor(ABSORPTION).view(1, 3, 1, 1) * uniform(random, (count, 3, 1, 1), 0.8, 1.2)
    colour = _fundus(random, count, size, disc) * torch.exp(-absorbed * absorption)
    colour = colour + bright * torch.tensor([0.25, 0.3, 0.15]).view(1, 3, 1, 1)
    level = uniform(random, (count, 1, 1, 1), 0.012, 0.035)
    return colour + level * torch.randn(count, 3, size, size, generator=random), mask


def _numpy_generator(random: torch.Generator) -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(2**62, (), generator=random)))


@dataclass
class _Tips:
    """The growing ends of all trees, arrays `[T]`; lengths in pixels.

    Attributes:
        image: index of the image.
        y, x: position.
        angle: direction of growth.
        bend: change of the angle per stride.
        heading: angle to which the direction returns.
        radius: radius of the vessel.
        contrast: remaining contrast of the vessel.
    """

    image: NDArray[np.int64]
    y: NDArray[np.float64]
    x: NDArray[np.float64]
    angle: NDArray[np.float64]
    bend: NDArray[np.float64]
    heading: NDArray[np.float64]
    radius: NDArray[np.float64]
    contrast: NDArray[np.float64]

    def take(self, which: NDArray[np.bool_]) -> _Tips:
        return _Tips(*(array[which] for array in vars(self).values()))

    def join(self, other: _Tips) -> _Tips:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Tips(*(np.concatenate(pair) for pair in pairs))


def _grow(count: int, size: int, disc: NDArray[np.float32], random: np.random.Generator) -> _Tips:
    """All points of the tips' paths; the trees begin at the discs, `[2, N]`, and at the border."""
    scale = size / REFERENCE
    tips = _roots(count, size, disc, random)
    room = random.uniform(LEAST_SHARE, MOST_SHARE, count) * size * size
    passed = tips.take(np.zeros(len(tips.image), bool))
    for _ in range(int(2.5 * REFERENCE / STRIDE)):
        inside = (np.abs(tips.y - size / 2) < size * 0.55) & (np.abs(tips.x - size / 2) < size * 0.55)
        tips = tips.take(inside & (room[tips.image] > 0) & (tips.radius >= THINNEST * scale))
        if not len(tips.image):
            break
        passed = passed.join(tips)
        np.subtract.at(room, tips.image, 2 * tips.radius * STRIDE * scale)
        _advance(tips, scale, random)
        tips = _branch(tips, scale, random)
    return passed


def _roots(count: int, size: int, disc: NDArray[np.float32], random: np.random.Generator) -> _Tips:
    """The roots: one tree of an image begins at a disc inside it, the others on a circle around the image."""
    image = np.repeat(np.arange(count), TREES)
    around = random.uniform(0, 2 * np.pi, count * TREES)
    y, x = (size * (0.5 + 0.52 * f(around)) for f in (np.sin, np.cos))
    first = np.arange(count * TREES) % TREES == 0
    inside = np.all((disc > 0) & (disc < size), axis=0)[image]
    y = np.where(first & inside, disc[0][image], y)
    x = np.where(first & inside, disc[1][image], x)
    # Trees grow towards a point near the centre.
    aim_y, aim_x = size * random.uniform(0.3, 0.7, (2, len(image)))
    radius = random.uniform(0.45, 1.0, len(image)) * THICKEST * size / REFERENCE
    heading = np.arctan2(aim_y - y, aim_x - x)
    return _Tips(
        image,
        y,
        x,
        heading,
        np.zeros(len(image)),
        heading,
        radius,
        random.uniform(0.6, 1.0, len(image)),
    )


def _advance(tips: _Tips, scale: float, random: np.random.Generator) -> None:
    """Move the tips by one stride. Thin vessels wind more, and all vessels get thinner and fainter."""
    thin = np.sqrt(THICKEST * scale / tips.radius)
    chance = 0.03 * thin * random.standard_normal(len(tips.bend))
    tips.bend = 0.85 * tips.bend + chance - 0.012 * (tips.angle - tips.heading)
    tips.angle = tips.angle + tips.bend
    tips.y = tips.y + STRIDE * scale * np.sin(tips.angle)
    tips.x = tips.x + STRIDE * scale * np.cos(tips.angle)
    tips.radius = tips.radius * 0.9988
    tips.contrast = tips.contrast * (1 - 0.0045 * thin)


def _branch(tips: _Tips, scale: float, random: np.random.Generator) -> _Tips:
    """Split some tips in two; the cubed radii add up to the cubed radius of the parent (Murray 1926)."""
    splits = random.random(len(tips.radius)) < BRANCHING
    cube = random.uniform(0.12, 0.5, len(splits))
    side = random.choice([-1.0, 1.0], len(splits))
    child = _Tips(*(array.copy() for array in vars(tips).values())).take(splits)
    child.radius = child.radius * np.cbrt(cube[splits])
    child.angle = child.angle + side[splits] * random.uniform(0.5, 1.1, int(splits.sum()))
    child.heading = child.angle
    child.contrast = child.contrast * 0.9
    tips.radius = np.where(splits, tips.radius * np.cbrt(1 - cube), tips.radius)
    # A branch that is too thin to see ends; its parent continues.
    tips.radius = np.where(splits, np.maximum(tips.radius, THINNEST * scale), tips.radius)
    tips.angle = np.where(splits, tips.angle - side * 0.15, tips.angle)
    tips.heading = np.where(splits, tips.angle, tips.heading)
    return tips.join(child)


def _draw(points: _Tips, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Optical depth float32 `[N, 1, S, S]` and mask uint8 `[N, S, S]` of discs around the points."""
    depth = np.zeros((count, size, size), np.float32)
    mask = np.zeros((count, size, size), bool)
    reach = np.ceil(points.radius + 0.5).astype(np.int64)
    scale = size / REFERENCE
    for own in np.unique(reach):
        some = points.take(reach == own)
        line = np.arange(-own, own + 1)
        shape = (len(some.image), len(line), len(line))
        y = np.floor(some.y).astype(np.int64)[:, None, None] + line[:, None]
        x = np.floor(some.x).astype(np.int64)[:, None, None] + line
        distance = np.hypot(y + 0.5 - some.y[:, None, None], x + 0.5 - some.x[:, None, None])
        cover = np.clip(some.radius[:, None, None] + 0.5 - distance, 0, 1)
        # A thin vessel contains less blood, so it absorbs less light.
        thickness = np.sqrt(some.radius / (THICKEST * scale))
        value = cover * (some.contrast * thickness)[:, None, None]
        image = np.broadcast_to(some.image[:, None, None], shape)
        y, x = np.broadcast_to(y, shape), np.broadcast_to(x, shape)
        inside = (y >= 0) & (y < size) & (x >= 0) & (x < size) & (cover > 0)
        where = image[inside], y[inside], x[inside]
        np.maximum.at(depth, where, value[inside].astype(np.float32))
        mask[tuple(index[cover[inside] >= 0.5] for index in where)] = True
    return torch.from_numpy(depth)[:, None], torch.from_numpy(mask)


def _ridges(random: torch.Generator, count: int, size: int) -> Tensor:
    """Wide, faint, crossing bands in [0, 1], `[N, 1, S, S]`: vessels of the layer behind."""
    fields = [clouds(random, count, size, cells) for cells in (3, 4)]
    bands = [(1 - 9 * (field - 0.5).abs()).clamp(min=0) for field in fields]
    return blur(torch.maximum(*bands), size * 0.015)


def _spots(random: torch.Generator, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Haemorrhages (dark) and exudates (bright), both `[N, 1, S, S]` in [0, 1]."""
    y, x = grid(size)
    centre = uniform(random, (2, count, SPOTS, 1, 1), 0, size)
    radius = uniform(random, (count, SPOTS, 1, 1), 0.006, 0.028) * size
    strength = uniform(random, (count, SPOTS, 1, 1), -0.8, 0.8)
    present = uniform(random, (count, SPOTS, 1, 1), 0, 1) < uniform(random, (count, 1, 1, 1), 0, 0.8)
    distance = torch.hypot(y - centre[0], x - centre[1])
    spots = (radius + 0.5 - distance).clamp(0, 1) * strength * present
    dark, bright = (-spots).amax(1, keepdim=True), spots.amax(1, keepdim=True)
    return blur(dark.clamp(min=0), size * 0.006), blur(bright.clamp(min=0), size * 0.006)


def _fundus(random: torch.Generator, count: int, size: int, disc: Tensor) -> Tensor:
    """The background `[N, 3, S, S]`: orange and unevenly lit, with the bright disc at `disc`, `[2, N]`."""
    tint = torch.tensor([0.78, 0.42, 0.22]).view(1, 3, 1, 1) * uniform(random, (count, 3, 1, 1), 0.75, 1.2)
    light = 0.55 + 0.5 * clouds(random, count, size, 1) + 0.15 * (clouds(random, count, size, 5) - 0.5)
    grain = 0.06 * (clouds(random, count, size, size // 3) - 0.5)
    y, x = grid(size)
    away = torch.hypot(y - disc[0].view(-1, 1, 1, 1), x - disc[1].view(-1, 1, 1, 1)) / size
    glow = torch.sigmoid((0.11 - away) / 0.012) + 0.4 * torch.exp(-away.square() / 0.06)
    return tint * (light + grain) + glow * torch.tensor([0.14, 0.2, 0.1]).view(1, 3, 1, 1)
