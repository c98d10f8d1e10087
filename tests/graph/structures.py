"""Small networks, one structure each, that are hard for channel propagation.

``STRUCTURES`` maps a name to a body, a function of a ``Piece`` and a feature map ``[2, 16, 8, 8]``.
``Net`` puts a convolution with batch norm before it and a head behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

Body = Callable[["Piece", Tensor], Tensor]


class Structure(NamedTuple):
    """A structure with layers of its own.

    Attributes:
        make: adds the layers to a module.
        body: the forward pass.
        prunable: number of channels of the whole ``Net`` that can be removed.
        out: number of channels that the body returns.
        anywhere: whether the body keeps the size of the map and takes inputs of any sign.
    """

    make: Callable[[nn.Module], None]
    body: Body
    prunable: int
    out: int
    anywhere: bool


class Piece(nn.Module):
    """One structure with its layers."""

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        structure.make(self)
        self.body = structure.body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


class Net(Piece):
    """Convolution, batch norm, relu, the structure, convolution to 5 outputs."""

    def __init__(self, structure: Structure) -> None:
        super().__init__(structure)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Conv2d(structure.out, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, F.relu(self.norm(self.stem(x)))))


STRUCTURES: dict[str, Structure] = {}


def structure(
    prunable: int,
    out: int = 16,
    anywhere: bool = True,
    **layers: Callable[[], nn.Module | nn.Parameter | Tensor],
) -> Callable[[Body], Body]:
    """Enter the decorated body; ``layers`` are made for every network anew."""

    def make(net: nn.Module) -> None:
        for name, layer in layers.items():
            made = layer()
            if isinstance(made, (nn.Module, nn.Parameter)):
                setattr(net, name, made)
            else:
                net.register_buffer(name, made)

    def enter(body: Body) -> Body:
        STRUCTURES[body.__name__] = Structure(make, body, prunable, out, anywhere)
        return body

    return enter


def conv(into: int, out: int, kernel: int = 1, **options: int) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(into, out, kernel, padding=kernel // 2, **options)
