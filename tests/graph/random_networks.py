"""Random networks, composed of common structures.

A structure is a function of a ``Draw`` (its choices) and an ``At`` (its input); it returns a
module and its output. ``STEPS`` holds those that go from one feature map to another, ``build``
puts a stem before a list of them and a head behind. A network is told by its ``Plan``: plain data,
so that a failure can be written down and shrunk.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class At:
    """A feature map: ``[2, channels, size, ...]`` with ``dims`` dimensions of space."""

    channels: int
    size: int
    dims: int = 2

    @property
    def space(self) -> tuple[int, ...]:
        return (self.size,) * self.dims


class Draw:
    """Choices that follow from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def one(self, *options: T) -> T:
        return self._random.choice(options)

    def chance(self, share: float = 0.5) -> bool:
        return self._random.random() < share

    def width(self) -> int:
        return self.one(4, 6, 8, 12, 16)


Head = Callable[[Draw, At], nn.Module]


class Step(NamedTuple):
    """make: the structure. dims: the dimensions of space that it is for."""

    make: Callable[[Draw, At], tuple[nn.Module, At]]
    dims: tuple[int, ...]


STEPS: dict[str, Step] = {}


def step(*dims: int) -> Callable[[Callable[[Draw, At], tuple[nn.Module, At]]], Any]:
    """Enter a structure, by default for 2-D maps."""

    def enter(make: Callable[[Draw, At], tuple[nn.Module, At]]) -> Any:
        STEPS[make.__name__] = Step(make, dims or (2,))
        return make

    return enter


class Run(nn.Module):
    """Modules, parameters and buffers with a function that uses them."""

    def __init__(self, run: Callable[..., Any], **held: Any) -> None:
        super().__init__()
        self.run = run
        for name, thing in held.items():
            if isinstance(thing, Tensor) and not isinstance(thing, nn.Parameter):
                self.register_buffer(name, thing)
            else:
                setattr(self, name, thing)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


def pick(kind: str, at: At) -> Any:
    """``nn.Conv2d`` or ``nn.Conv3d`` and the like."""
    return getattr(nn, f"{kind}{at.dims}d")


def conv(at: At, out: int, kernel: int = 1, **options: Any) -> nn.Module:
    return pick("Conv", at)(at.channels, out, kernel, padding=kernel // 2, **options)


def norm(draw: Draw, at: At) -> nn.Module:
    groups = draw.one(*(g for g in (1, 2, 4) if at.channels % g == 0))
    return draw.one(
        pick("BatchNorm", at)(at.channels),
        pick("BatchNorm", at)(at.channels),
        pick("BatchNorm", at)(at.channels, affine=False),
        pick("InstanceNorm", at)(at.channels, affine=draw.chance()),
        nn.GroupNorm(groups, at.channels),
        nn.Identity(),
    )


def activation(draw: Draw, at: At) -> nn.Module:
    inplace = draw.chance()
    return draw.one(
        nn.ReLU(inplace),
        nn.ReLU6(),
        nn.SiLU(inplace),
        nn.GELU(),
        nn.LeakyReLU(0.1, inplace),
        nn.Hardswish(inplace),
        nn.ELU(),
        nn.Mish(),
        nn.Tanh(),
        nn.PReLU(),
        nn.PReLU(at.channels),
        nn.Sigmoid(),
        nn.Identity(),
    )


def block(draw: Draw, at: At, out: int, **options: Any) -> nn.Module:
    """Convolution, norm, activation."""
    after = replace(at, channels=out)
    first = conv(at, out, draw.one(1, 3), bias=draw.chance(), **options)
    return nn.Sequential(first, norm(draw, after), activation(draw, after))


class Plan(NamedTuple):
    """steps: names of structures with the seeds of their choices. seed: of all other choices."""

    steps: tuple[tuple[str, int], ...]
    seed: int
    dims: int = 2


class Network(nn.Module):
    """A stem, the steps, a head; a second input, if any, joins behind the stem."""

    def __init__(self, stem: nn.Module, join: nn.Module | None, steps: Sequence[nn.Module], head: nn.Module):
        super().__init__()
        self.stem, self.join, self.steps, self.head = stem, join, nn.Sequential(*steps), head
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        x = self.stem(x)
        if self.join is not None and other is not None:
            x = x + self.join(other)
        return self.head(self.steps(x))


def build(
    plan: Plan, heads: Sequence[Callable[[Draw, At], nn.Module]]
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The network, which ends in one of ``heads``, and example inputs."""
    torch.manual_seed(plan.seed)
    draw = Draw(plan.seed)
    at = At(3, 8 if plan.dims == 2 else 4, plan.dims)
    shape = (2, 3, *at.space)
    width = draw.width()
    stem, second = block(draw, at, width), draw.chance(0.2)
    join = conv(at, width) if second else None
    at = replace(at, channels=width)
    steps = []
    for name, seed in plan.steps:
        made, at = STEPS[name].make(Draw(seed), at)
        steps.append(made)
        if draw.chance(0.1):
            for parameter in made.parameters():
                parameter.requires_grad_(False)
    network = Network(stem, join, steps, draw.one(*heads)(draw, at))
    generator = torch.Generator().manual_seed(plan.seed)
    inputs = [torch.randn(shape, generator=generator) for _ in range(2 if second else 1)]
    return network, tuple(inputs)


def random_plan(seed: int, only: Sequence[str] = ()) -> Plan:
    """One of very many networks, of any structures or of one or two of those named in ``only``."""
    draw = Draw(seed)
    dims = 3 if not only and draw.chance(0.15) else 2
    names = list(only) or [name for name, entry in STEPS.items() if dims in entry.dims]
    count = draw.one(1, 1, 2) if only else draw.one(1, 2, 2, 3, 3, 4)
    return Plan(tuple((draw.one(*names), draw.one(*range(10_000))) for _ in range(count)), seed, dims)


def tokens(x: Tensor) -> Tensor:
    """``[n, c, h, w]`` to ``[n, h * w, c]``."""
    return x.flatten(2).transpose(1, 2)


def pooled(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


def drop_path(net: nn.Module, x: Tensor, share: float = 0.3) -> Tensor:
    """Whole images to zero in training."""
    if not net.training:
        return x
    keep = torch.empty([x.shape[0]] + [1] * (x.ndim - 1), dtype=x.dtype).bernoulli_(1 - share)
    return x * keep / (1 - share)
