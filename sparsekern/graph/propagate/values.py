"""The interpreter's knowledge of a tensor that flows through the network."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

Ids = np.ndarray | None
Flags = np.ndarray | None


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor seen as slots.

    Attributes:
        shape: Sizes of the tensor.
        ids: Per dimension an int64 array of slot ids (-1: stays), or None if nothing is tracked.
        zero: Per dimension a bool array: whether the slice at an index is exactly zero whenever its
            channel is masked. None where ``ids`` is None.
        itemsize: Bytes per element.
        untracked_reason: Why untracked indices of this value stay.
        zero_broken_by: The op that made a slice of a masked channel differ from zero, for messages.
        origins: Producers (indices into ``Records.producers``) whose zeros this value still carries.
        pure: Producers whose positive rescaling rescales this value by the same factor: only moves,
            pooling, relu and the like lie between.
        storage: Values with equal numbers may share memory; an in-place op affects all of them.
        static: Whether it is computed from parameters, buffers and constants alone, like a weight.
        made_of: Numbers of the parameters and buffers that a static value is computed from.
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
    made_of: frozenset[int] = field(default_factory=frozenset)

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def tracked(self) -> bool:
        """Whether any dimension has slots."""
        return any(ids is not None for ids in self.ids)

    def with_cleared_zeros(self, op: str) -> Value:
        """Make the same value with no slice known to be zero.

        Args:
            op: The op that broke the zeros, for messages.

        Returns:
            The value.
        """
        zero = tuple(None if z is None else np.zeros_like(z) for z in self.zero)
        return replace(self, zero=zero, zero_broken_by=op, origins=frozenset())


def untracked(
    shape: tuple[int, ...], itemsize: int, untracked_reason: str, storage: int, *, static: bool = False
) -> Value:
    """Make a value without tracked slots, so that no index can be removed.

    Args:
        shape: Sizes of the tensor.
        itemsize: Bytes per element.
        untracked_reason: Why its indices stay.
        storage: The value's storage number.
        static: Whether it is computed from parameters, buffers and constants alone.

    Returns:
        The value.
    """
    none: tuple[None, ...] = (None,) * len(shape)
    return Value(
        shape, none, none, itemsize, untracked_reason=untracked_reason, storage=storage, static=static
    )
