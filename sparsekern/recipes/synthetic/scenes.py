"""Street-like scenes of eight classes, Generator with their label maps.

Things stand on the ground, get smaller with distance, and hide the things behind them. Ground, sky and
buildings fill most pixels; persons, poles and signs fill a few percent. The hood of the camera's car and
things without a class are void.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekern.recipes.synthetic.fields import Generator, blur, clouds, grid, uniform

GROUND, SKY, BUILDING, VEGETATION, VEHICLE, PERSON, POLE, SIGN = CLASSES = range(8)
NAMES = ("ground", "sky", "building", "vegetation", "vehicle", "person", "pole", "sign")
VOID = 255
BUILDINGS, THINGS = 7, 16  # drawn per image


@Generator
def generate(count: int, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images float32 `[N, 3, S, S]` and label maps int64 `[N, S, S]` of `NAMES` and `VOID`."""
    horizon = uniform(random, (count,), 0.3, 0.5)
    canvas = _Canvas(random, count, size)
    _backdrop(canvas, horizon)
    for number in range(BUILDINGS):
        _building(canvas, horizon, number)
    _hedges(canvas, horizon)
    # Things are drawn from far to near, so that nearer things hide farther ones.
    depth = uniform(random, (count, THINGS), 0, 1).square().sort(1).values
    kind = torch.multinomial(torch.tensor(CHANCES), count * THINGS, True, generator=random).view(count, -1)
    for number in range(THINGS):
        for own, draw in enumerate(DRAWINGS):
            which = (kind[:, number] == own).nonzero()[:, 0]
            if len(which):
                draw(canvas, _place(canvas, which, horizon, depth[:, number]))
    _hood(canvas)
    return _photographed(canvas), canvas.label


class _Canvas:
    """The images during drawing.

    Attributes:
        random: the random generator.
        colour: float32 `[N, 3, S, S]`.
        label: int64 `[N, S, S]`.
        y, x: `[S, 1]` and `[1, S]`, centres of the pixels, as shares of the edge.
        grain: fine texture, `[N, 1, S, S]`, mean 0.
    """

    def __init__(self, random: torch.Generator, count: int, size: int) -> None:
        self.random, self.count, self.size = random, count, size
        self.colour = torch.zeros(count, 3, size, size)
        self.label = torch.full((count, size, size), GROUND)
        self.y, self.x = (axis / size for axis in grid(size))
        self.grain = clouds(random, count, size, size // 2) - 0.5

    def paint(self, which: Tensor, shape: Tensor, label: int, colour: Tensor) -> None:
        """Fill `shape` bool `[n, S, S]` of the images `which` with `colour`, broadcast to `[n, 3, S, S]`."""
        self.colour[which] = torch.where(shape[:, None], colour, self.colour[which])
        self.label[which] = torch.where(shape, label, self.label[which])

    def tints(self, count: int, low: float, high: float, spread: float) -> Tensor:
        """Random colours `[n, 3, 1, 1]`: a grey in [low, high), each channel changed by up to `spread`."""
        grey = uniform(self.random, (count, 1, 1, 1), low, high)
        return grey + uniform(self.random, (count, 3, 1, 1), -spread, spread)

    def box(self, centre: Tensor, bottom: Tensor, half: Tensor, height: Tensor) -> Tensor:
        """Upright rectangles, bool `[n, S, S]`; the arguments are shares of the edge, `[n]`."""
        centre, bottom, half, height = (a.view(-1, 1, 1) for a in (centre, bottom, half, height))
        return ((self.x - centre).abs() < half) & (self.y < bottom) & (self.y > bottom - height)

    def oval(self, centre: Tensor, middle: Tensor, half: Tensor, half_height: Tensor) -> Tensor:
        """Ellipses around (`middle`, `centre`), bool `[n, S, S]`; arguments are shares of the edge, `[n]`."""
        centre, middle, half, half_height = (a.view(-1, 1, 1) for a in (centre, middle, half, half_height))
        return ((self.x - centre) / half).square() + ((self.y - middle) / half_height).square() < 1


@dataclass(frozen=True)
class _Place:
    """Positions of things, `[n]`; lengths are shares of the edge.

    Attributes:
        which: indices of the images.
        x: horizontal position.
        foot: vertical position of the foot.
        tall: height of a person at this distance.
    """

    which: Tensor
    x: Tensor
    foot: Tensor
    tall: Tensor

    def __len__(self) -> int:
        return len(self.which)


def _place(canvas: _Canvas, which: Tensor, horizon: Tensor, depth: Tensor) -> _Place:
    foot = horizon + (1.0 - horizon) * (0.06 + 0.9 * depth)
    x = uniform(canvas.random, (len(which),), -0.05, 1.05)
    return _Place(which, x, foot[which], 0.09 + 0.62 * (foot - horizon)[which])


def _backdrop(canvas: _Canvas, horizon: Tensor) -> None:
    """Sky with clouds, and ground with markings."""
    random, count, size = canvas.random, canvas.count, canvas.size
    every, line = torch.arange(count), horizon.view(-1, 1, 1)
    ground = canvas.tints(count, 0.3, 0.5, 0.03) + 0.1 * (clouds(random, count, size, 4) - 0.5)
    canvas.paint(every, torch.ones_like(canvas.label, dtype=torch.bool), GROUND, ground + 0.12 * canvas.grain)
    # The stripes meet at the horizon.
    near = (canvas.y - line).clamp(min=1e-3)
    slant = (canvas.x - uniform(random, (count, 1, 1), 0.2, 0.8)) / near
    dashed = torch.sin(uniform(random, (count, 1, 1), 2, 5) / near.clamp(min=0.03)) > -0.3
    stripes = ((slant - slant.round()).abs() < 0.03) & dashed & (canvas.y > line)
    canvas.paint(every, stripes, GROUND, ground + 0.3)
    sky = canvas.tints(count, 0.6, 0.85, 0.03) + torch.tensor([-0.1, 0.0, 0.1]).view(1, 3, 1, 1)
    sky = sky + 0.35 * (clouds(random, count, size, 4) - 0.4).clamp(min=0) + 0.1 * (line - canvas.y)[:, None]
    canvas.paint(every, (canvas.y < line).expand(-1, -1, size), SKY, sky)


def _building(canvas: _Canvas, horizon: Tensor, number: int) -> None:
    """One building per image, with windows; later buildings are nearer."""
    random, count = canvas.random, canvas.count
    near = number / BUILDINGS
    half = uniform(random, (count,), 0.05, 0.14) * (1 + near)
    centre = uniform(random, (count,), 0, 1)
    bottom = horizon + 0.02 + 0.06 * near
    height = uniform(random, (count,), 0.08, 0.42) * (0.6 + 0.6 * near)
    # A third of the buildings is left out, which leaves gaps for streets.
    which = (uniform(random, (count,), 0, 1) < 0.66).nonzero()[:, 0]
    shape = canvas.box(centre, bottom, half, height)[which]
    wall = canvas.tints(count, 0.3, 0.7, 0.1)[which] + 0.1 * canvas.grain[which]
    pitch = uniform(random, (2, count, 1, 1), 0.03, 0.06)
    rows, columns = (canvas.y / pitch[0]).frac(), (canvas.x / pitch[1]).frac()
    windows = ((rows > 0.45) & (columns > 0.5))[which, None]
    shade = uniform(random, (count, 1, 1, 1), -0.28, 0.15)[which]
    canvas.paint(which, shape, BUILDING, wall + windows * shade)


def _hedges(canvas: _Canvas, horizon: Tensor) -> None:
    """Bushes along the horizon, with an uneven upper edge."""
    random, count, size = canvas.random, canvas.count, canvas.size
    crest = clouds(random, count, size, 7)[:, 0, :1] + 0.4 * clouds(random, count, size, 24)[:, 0, :1]
    top = horizon.view(-1, 1, 1) + 0.1 - 0.28 * (crest - 0.45)
    shape = (canvas.y > top) & (canvas.y < horizon.view(-1, 1, 1) + 0.05)
    canvas.paint(torch.arange(count), shape, VEGETATION, _leaves(canvas, torch.arange(count)))


def _leaves(canvas: _Canvas, which: Tensor) -> Tensor:
    green = torch.tensor([0.22, 0.36, 0.14]).view(1, 3, 1, 1) * canvas.tints(len(which), 0.8, 1.3, 0.15)
    return green + 0.35 * canvas.grain[which]


def _tree(canvas: _Canvas, place: _Place) -> None:
    height = place.tall * uniform(canvas.random, (len(place),), 1.2, 2.0)
    trunk = canvas.box(place.x, place.foot, 0.05 * height, 0.6 * height)
    canvas.paint(place.which, trunk, VEGETATION, canvas.tints(len(place), 0.2, 0.32, 0.05))
    fringe = 1 + 0.5 * canvas.grain[place.which, 0]
    half, middle = 0.3 * height, place.foot - 0.72 * height
    away = ((canvas.x - place.x.view(-1, 1, 1)) / half.view(-1, 1, 1)).square()
    away = away + ((canvas.y - middle.view(-1, 1, 1)) / (1.1 * half.view(-1, 1, 1))).square()
    canvas.paint(place.which, away < fringe, VEGETATION, _leaves(canvas, place.which))


def _vehicle(canvas: _Canvas, place: _Place) -> None:
    random, count = canvas.random, len(place)
    height = place.tall * uniform(random, (count,), 0.7, 0.9)
    half = height * uniform(random, (count,), 0.65, 1.3)
    paint = canvas.tints(count, 0.1, 0.75, 0.2)
    cabin = canvas.oval(place.x, place.foot - 0.55 * height, 0.72 * half, 0.45 * height)
    canvas.paint(place.which, cabin, VEHICLE, paint)
    glass = canvas.oval(place.x, place.foot - 0.6 * height, 0.6 * half, 0.3 * height)
    canvas.paint(place.which, glass, VEHICLE, canvas.tints(count, 0.1, 0.3, 0.04))
    body = canvas.box(place.x, place.foot - 0.1 * height, half, 0.48 * height)
    canvas.paint(place.which, body, VEHICLE, paint)
    for side in (-0.6, 0.6):
        wheel = canvas.oval(place.x + side * half, place.foot - 0.14 * height, 0.15 * height, 0.15 * height)
        canvas.paint(place.which, wheel, VEHICLE, torch.full((count, 3, 1, 1), 0.08))


def _person(canvas: _Canvas, place: _Place) -> None:
    height, count = place.tall, len(place)
    legs = canvas.box(place.x, place.foot, 0.09 * height, 0.5 * height)
    canvas.paint(place.which, legs, PERSON, canvas.tints(count, 0.1, 0.4, 0.1))
    trunk = canvas.oval(place.x, place.foot - 0.62 * height, 0.15 * height, 0.24 * height)
    canvas.paint(place.which, trunk, PERSON, canvas.tints(count, 0.15, 0.8, 0.25))
    head = canvas.oval(place.x, place.foot - 0.91 * height, 0.085 * height, 0.1 * height)
    skin = torch.tensor([0.75, 0.55, 0.45]).view(1, 3, 1, 1) * uniform(
        canvas.random, (count, 1, 1, 1), 0.5, 1.1
    )
    canvas.paint(place.which, head, PERSON, skin)


def _pole(canvas: _Canvas, place: _Place) -> None:
    """A pole, in most cases with a sign."""
    random, count = canvas.random, len(place)
    height = place.tall * uniform(random, (count,), 1.4, 2.4)
    thickness = (0.012 * height).clamp(min=0.5 / canvas.size)
    shape = canvas.box(place.x, place.foot, thickness, height)
    canvas.paint(place.which, shape, POLE, canvas.tints(count, 0.25, 0.6, 0.02))
    signed = (uniform(random, (count,), 0, 1) < 0.75).nonzero()[:, 0]
    half = (place.tall * uniform(random, (count,), 0.11, 0.18))[signed]
    x, middle = place.x[signed], (place.foot - height)[signed] + half
    hue = torch.tensor([[0.85, 0.1, 0.1], [0.1, 0.25, 0.8], [0.9, 0.8, 0.1]])
    colour = hue[torch.randint(3, (len(signed),), generator=random)].view(-1, 3, 1, 1)
    round_ = uniform(random, (len(signed), 1, 1), 0, 1) < 0.5
    plate = torch.where(
        round_, canvas.oval(x, middle, half, half), canvas.box(x, middle + half, half, 2 * half)
    )
    canvas.paint(place.which[signed], plate, SIGN, colour)
    inner = canvas.oval(x, middle, 0.5 * half, 0.5 * half)
    canvas.paint(place.which[signed], inner, SIGN, colour * 0.3 + 0.6)


def _unnamed(canvas: _Canvas, place: _Place) -> None:
    """A bin, a box or a barrier, labelled as void."""
    random, count = canvas.random, len(place)
    half, height = (
        place.tall * uniform(random, (count,), low, high) for low, high in ((0.1, 0.4), (0.3, 0.6))
    )
    shape = canvas.box(place.x, place.foot, half, height)
    canvas.paint(place.which, shape, VOID, canvas.tints(count, 0.15, 0.7, 0.2))


def _hood(canvas: _Canvas) -> None:
    """The hood of the camera's car at the lower edge of half of the images, labelled as void."""
    which = (uniform(canvas.random, (canvas.count,), 0, 1) < 0.5).nonzero()[:, 0]
    count = len(which)
    half = uniform(canvas.random, (count,), 0.5, 0.9)
    height = uniform(canvas.random, (count,), 0.06, 0.13)
    shape = canvas.oval(torch.full((count,), 0.5), torch.ones(count), half, height)
    canvas.paint(which, shape, VOID, canvas.tints(count, 0.1, 0.4, 0.05) + 0.5 * (1 - canvas.y))


def _photographed(canvas: _Canvas) -> Tensor:
    """The colours of the canvas with uneven light, slight blur and noise."""
    random, count, size = canvas.random, canvas.count, canvas.size
    light = uniform(random, (count, 1, 1, 1), 0.65, 1.15) * (0.8 + 0.4 * clouds(random, count, size, 2))
    cast = uniform(random, (count, 3, 1, 1), 0.92, 1.08)
    colour = (canvas.colour * light * cast).flatten(0, 1)[:, None]
    colour = blur(colour, 0.004 * size).view(count, 3, size, size)
    level = uniform(random, (count, 1, 1, 1), 0.01, 0.035)
    return colour + level * torch.randn(count, 3, size, size, generator=random)


# Drawing functions of the kinds of things, and the probability of each kind.
DRAWINGS: tuple[Callable[[_Canvas, _Place], None], ...] = (_tree, _vehicle, _person, _pole, _unnamed)
CHANCES = (0.12, 0.26, 0.17, 0.24, 0.1)
