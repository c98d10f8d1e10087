"""Values that change with the number of channels that a mean runs over.

A mean over N channels of which N - n are zero is n / N times the mean over the other n. So the compact
network's mean is N / n times the masked network's. What follows from it alone (``(mean + eps) ** -0.5``)
is a power of N / n times as large, if eps grows by the same factor. The weight that multiplies the result
takes the inverse factor, and both networks compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


def grown(number: float, whole: int, left: int, exponent: float) -> float:
    """``number`` times a power of the factor by which a mean grows.

    Args:
        number: a number that is compared with the mean, such as an epsilon.
        whole: the number of channels before the removal, N.
        left: the number of channels that stay, n.
        exponent: the power.

    Returns:
        ``number * (whole / left) ** exponent``.
    """
    return float(number * (whole / left) ** exponent)


@dataclass(frozen=True)
class Rescale:
    """How the values of a tensor follow the number of its indices.

    If n of N indices along ``dim`` stay, a value w becomes ``(w + offset) * (N / n) ** exponent - offset``.

    Attributes:
        dim: the dimension.
        exponent: the power of N / n, such as 0.5 for the weight of an RMSNorm.
        offset: the constant that the network adds to the tensor: 1 for a weight used as ``1 + w``.
        numbers: attributes of modules that hold the epsilons, as (path, power of N / n).
    """

    dim: int
    exponent: float
    offset: float = 0.0
    numbers: tuple[tuple[str, float], ...] = ()

    def factor(self, whole: int, left: int) -> float:
        """The factor ``(whole / left) ** exponent``."""
        return grown(1.0, whole, left, self.exponent)

    def check(self, shape: tuple[int, ...]) -> None:
        """Check the rule for a tensor of ``shape``.

        Raises:
            ValueError: the dimension does not exist, or a number is not finite.
        """
        if type(self.dim) is not int or not 0 <= self.dim < len(shape):
            raise ValueError(f"rescale: dimension {self.dim!r} does not exist in a tensor of {shape}")
        numbers = [self.exponent, self.offset, *(power for _, power in self.numbers)]
        if not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
            raise ValueError(f"rescale: got {numbers}, expected finite numbers")
        if not all(isinstance(path, str) for path, _ in self.numbers):
            raise ValueError(f"rescale: got attributes {self.numbers}, expected names")

    def to_plain(self) -> dict[str, Any]:
        """The rule as plain data."""
        return {
            "dim": self.dim,
            "exponent": self.exponent,
            "offset": self.offset,
            "numbers": dict(self.numbers),
        }

    @classmethod
    def from_plain(cls, plain: Any) -> Rescale:
        """The rule that ``to_plain`` gave.

        Raises:
            ValueError: the data has another form.
        """
        if not isinstance(plain, dict) or plain.keys() != {"dim", "exponent", "offset", "numbers"}:
            raise ValueError("rescale: expected dim, exponent, offset and numbers")
        if not isinstance(plain["numbers"], dict):
            raise ValueError("rescale: numbers: expected attribute -> power")
        return cls(plain["dim"], plain["exponent"], plain["offset"], tuple(plain["numbers"].items()))

    def inside(self, prefix: str) -> Rescale:
        """The same rule with ``prefix`` in front of the attribute names."""
        return replace(self, numbers=tuple((f"{prefix}.{path}", power) for path, power in self.numbers))

    def renamed(self, name_of: Callable[[str], str | None]) -> Rescale:
        """The same rule with other attribute names; without those for which ``name_of`` gives None."""
        moved = ((name_of(path), power) for path, power in self.numbers)
        return replace(self, numbers=tuple((path, power) for path, power in moved if path is not None))
