"""What the interpreter knows about a tensor that flows through the network."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

Ids = np.ndarray | None
Flags = np.ndarray | None


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor seen as slots.

    ids: per dimension an int64 array of slot ids (-1: stays), or None where nothing is tracked.
    zero: per dimension a bool array: the slice at that index is exactly zero whenever its channel
        is masked. None where ``ids`` is None.
    why: why untracked indices of this value stay.
    cleared: the op that made a slice of a masked channel differ from zero, for messages.
    origins: producers (indices into ``Records.producers``) whose zeros this value still carries.
    pure: producers of which this value is a rescaling-equivariant image (moves, pools, relu).
    storage: values with equal numbers may share memory; an in-place op touches all of them.
    static: computed from parameters, buffers and constants alone, as weights are.
    made_of: numbers of the parameters and buffers that a static value was computed from.
    """

    shape: tuple[int, ...]
    ids: tuple[Ids, ...]
    zero: tuple[Flags, ...]
    itemsize: int = 4
    why: str = ""
    cleared: str = ""
    origins: frozenset[int] = field(default_factory=frozenset)
    pure: frozenset[int] = field(default_factory=frozenset)
    storage: int = -1
    static: bool = False
    made_of: frozenset[int] = field(default_factory=frozenset)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def tracked(self) -> bool:
        return any(ids is not None for ids in self.ids)

    def with_cleared_zeros(self, op: str) -> Value:
        """The same value with no slice known to be zero."""
        zero = tuple(None if z is None else np.zeros_like(z) for z in self.zero)
        return replace(self, zero=zero, cleared=op, origins=frozenset())


def untracked(
    shape: tuple[int, ...], itemsize: int, why: str, storage: int, *, static: bool = False
) -> Value:
    """A value none of whose indices can be removed."""
    none: tuple[None, ...] = (None,) * len(shape)
    return Value(shape, none, none, itemsize, why=why, storage=storage, static=static)
