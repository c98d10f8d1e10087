"""The interpreter's knowledge of a tensor that flows through the network."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

Ids = np.ndarray | None
Flags = np.ndarray | None


class Affine(NamedTuple):
    """A static value ``factor * w + offset`` of one registered tensor w.

    Attributes:
        tensor: the tensor's number.
        factor: the factor.
        offset: the offset.
    """

    tensor: int
    factor: float = 1.0
    offset: float = 0.0


class Scale(NamedTuple):
    """A weight that a value is a multiple of, as in ``w * x``.

    Attributes:
        weight: the weight as an affine function of a tensor.
        ids: its slot ids, per dimension.
    """

    weight: Affine
    ids: tuple[Ids, ...]


@dataclass(frozen=True, slots=True)
class Average:
    """A factor of a value that depends on the number of channels that a mean runs over.

    The compact network's value is ``(N / n) ** exponent`` times the masked network's, where n of the N
    channels stay.

    Attributes:
        ids: raw slot ids of the channels, int64 ``[N]``.
        exponent: the power.
        reason: why the channels stay if nothing makes up for the factor.
        epsilons: numbers (indices into ``Records.epsilons``) of the constants that have to grow with it.
    """

    ids: np.ndarray
    exponent: float
    reason: str
    epsilons: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Constant:
    """The slices of a value that depend on no other channel while their own channels are masked.

    Attributes:
        dim: the only dimension that holds channels.
        flags: along it, whether the slice at an index is zero or constant, bool.
        origins: producers (indices into ``Records.producers``) whose zeros make them constant.
        values: along the same dimension, the number of the expression of each slice's value, int64; -1 where
            it is not known or is not the same everywhere in the slice.
    """

    dim: int
    flags: np.ndarray
    origins: frozenset[int]
    values: np.ndarray


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor seen as slots.

    Attributes:
        shape: sizes of the tensor.
        ids: per dimension an int64 array of slot ids (-1: stays), or None if nothing is tracked.
        zero: per dimension a bool array: whether the slice at an index is exactly zero whenever its
            channel is masked. None where ``ids`` is None.
        itemsize: bytes per element.
        untracked_reason: why untracked indices of this value stay.
        zero_broken_by: the op that made a slice of a masked channel differ from zero, for messages.
        origins: producers (indices into ``Records.producers``) whose zeros this value still carries.
        pure: producers whose positive rescaling rescales this value by the same factor: only moves,
            pooling, relu and the like lie between.
        storage: values with equal numbers may share memory; an in-place op affects all of them.
        static: whether it is computed from parameters, buffers and constants alone, like a weight.
        picked: whether it is a stack of weights that data picks by number, such as those of experts.
        made_of: numbers of the parameters and buffers that a static value is computed from.
        affine: the tensor that it is an affine function of; None if it is none.
        average: the factor by which it depends on the number of channels; None if there is none.
        scale: a weight that it is a multiple of; None if none is known.
        total: slot ids of the channels that it is a sum over, int64; None if it is no such sum.
        numbers: the numbers in a constant of integers; empty if they are not known.
        constant: the slices that are constant where they are not zero; None if no slice is known to be.
    """

    shape: tuple[int, ...]
    ids: tuple[Ids, ...]
    zero: tuple[Flags, ...]
    itemsize: int = 4
    untracked_reason: str = ""
    zero_broken_by: str = ""
    origins: frozenset[int] = field(default_factory=frozenset)
    pure: frozenset[int] = field(default_factory=frozenset)
    storage: int = -1
    static: bool = False
    picked: bool = False
    made_of: frozenset[int] = field(default_factory=frozenset)
    affine: Affine | None = None
    average: Average | None = None
    scale: Scale | None = None
    total: Ids = None
    numbers: tuple[int, ...] = ()
    constant: Constant | None = None

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def weight(self) -> bool:
        """Whether it is a weight, or a stack of picked weights."""
        return self.static or self.picked

    @property
    def tracked(self) -> bool:
        """Whether any dimension has slots."""
        return any(ids is not None for ids in self.ids)

    def with_cleared_zeros(self, op: str) -> Value:
        """Make the same value with no slice known to be zero or constant.

        Args:
            op: the op that broke the zeros, for messages.

        Returns:
            The value.
        """
        zero = tuple(None if z is None else np.zeros_like(z) for z in self.zero)
        return replace(self, zero=zero, zero_broken_by=op, origins=frozenset(), constant=None)


def untracked(
    shape: tuple[int, ...], itemsize: int, untracked_reason: str, storage: int, *, static: bool = False
) -> Value:
    """Make a value without tracked slots, so that no index can be removed.

    Args:
        shape: sizes of the tensor.
        itemsize: bytes per element.
        untracked_reason: why its indices stay.
        storage: the value's storage number.
        static: whether it is computed from parameters, buffers and constants alone.

    Returns:
        The value.
    """
    none: tuple[None, ...] = (None,) * len(shape)
    return Value(
        shape, none, none, itemsize, untracked_reason=untracked_reason, storage=storage, static=static
    )
