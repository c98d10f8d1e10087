"""Slots and their classes: a union-find over flat integer arrays.

A slot is one index along one dimension of one parameter or buffer, or of a dimension whose size the program
names (``torch.zeros(n, size)``, ``expand``). Values that flow through the network carry an array of slot
ids for each dimension. ``STAYS`` marks an index that can never be removed.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

STAYS = -1

# The tensor number of slots that belong to no parameter or buffer.
_NO_TENSOR = -1


class Slots:
    """A union-find whose operations take whole arrays.

    The smaller root always wins, so the result does not depend on the order of operations. A frozen
    slot keeps the first reason given for it. A class is frozen if any of its slots is.

    Attributes:
        reasons: all reasons, by number.
        step: the step of the program that is interpreted.
        steps: the step at which each reason was given first, by number.
    """

    def __init__(self) -> None:
        # The arrays grow by doubling. Elements after the allocated ids are undefined.
        self._parent = np.empty(1024, np.int64)
        self._reason = np.empty(1024, np.int32)
        self._starts = np.empty(64, np.int64)
        self._size = 0
        self._owners: list[tuple[int, int]] = []
        self._named: dict[Hashable, np.ndarray] = {}
        self._held = np.empty(0, bool)
        self._reason_index: dict[str, int] = {}
        self._stays = np.empty(0, bool)
        self.reasons: list[str] = []
        self.step = 0
        self.steps: list[int] = []

    def __len__(self) -> int:
        return self._size

    def allocate(self, owner: tuple[int, int], count: int) -> np.ndarray:
        """Allocate slots for a dimension.

        Args:
            owner: (tensor number, dimension).
            count: the size of the dimension.

        Returns:
            New slot ids, int64 ``[count]``.
        """
        start, end = self._size, self._size + count
        self._parent, self._reason = _grown(self._parent, end), _grown(self._reason, end)
        self._starts = _grown(self._starts, len(self._owners) + 1)
        ids = np.arange(start, end, dtype=np.int64)
        self._parent[start:end] = ids
        self._reason[start:end] = -1
        self._starts[len(self._owners)] = start
        self._owners.append(owner)
        self._size = end
        return ids

    def named(self, key: Hashable, count: int) -> np.ndarray:
        """The slots of a dimension whose size the program names.

        Whether that size follows channels shows in a smaller copy. No parameter or buffer holds these slots.

        Args:
            key: tells the dimension; the same key gives the same slots.
            count: the size of the dimension.

        Returns:
            Slot ids, int64 ``[count]``.
        """
        if key not in self._named:
            self._named[key] = self.allocate((_NO_TENSOR, 0), count)
        return self._named[key]

    def registered(self, ids: np.ndarray) -> np.ndarray:
        """Which raw ids, all >= 0, are those of a parameter or buffer; bool in the shape of ``ids``."""
        if len(self._held) != len(self._owners):
            self._held = np.array([tensor != _NO_TENSOR for tensor, _ in self._owners])
        held: np.ndarray = self._held[self._where(ids)]
        return held

    def are_named(self, ids: np.ndarray) -> bool:
        """Whether the slots ``ids`` are all those of a size that the program names."""
        if not self._named or not len(ids) or (ids < 0).any():
            return False
        return not self.registered(ids).any()

    def owners(self, ids: np.ndarray) -> list[tuple[int, int]]:
        """The distinct (tensor number, dimension) pairs that the raw ids were allocated for."""
        where = np.unique(self._where(ids[ids >= 0]))
        return [self._owners[i] for i in where if self._owners[i][0] != _NO_TENSOR]

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find the places of slots.

        Args:
            ids: raw ids, int64 ``[N]``, all >= 0.

        Returns:
            Tensor number, dimension and index of every slot, each int64 ``[N]``.
        """
        where = self._where(ids)
        owners = np.asarray(self._owners, np.int64).reshape(-1, 2)[where]
        return owners[:, 0], owners[:, 1], ids - self._starts[where]

    def _where(self, ids: np.ndarray) -> np.ndarray:
        """The number of the allocation of every raw id."""
        return np.searchsorted(self._starts[: len(self._owners)], ids, side="right") - 1

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The root of every id, int64 in the shape of ``ids``. ``STAYS`` maps to itself."""
        live = ids >= 0
        roots = ids[live]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = self._parent[above]
        self._parent[ids[live]] = roots
        result = np.full(ids.shape, STAYS, np.int64)
        result[live] = roots
        return result

    def union(self, left: np.ndarray, right: np.ndarray, reason: str) -> None:
        """Join slots pairwise.

        Args:
            left: slot ids, int64 ``[N]``.
            right: slot ids, int64 ``[N]``.
            reason: why a slot that is paired with ``STAYS`` is frozen.
        """
        if left is right:
            return
        self.freeze(left[right < 0], reason)
        self.freeze(right[left < 0], reason)
        both = (left >= 0) & (right >= 0)
        left, right = left[both], right[both]
        while True:
            left, right = self.find(left), self.find(right)
            differ = left != right
            if not differ.any():
                return
            left, right = left[differ], right[differ]
            # Several pairs may change the parent of one root. The smallest wins; the loop joins the rest.
            np.minimum.at(self._parent, np.maximum(left, right), np.minimum(left, right))

    def freeze(self, ids: np.ndarray, reason: str) -> None:
        """Mark slots that must stay. Slots that are already frozen keep their first reason.

        Args:
            ids: slot ids, int64. ``STAYS`` is ignored.
            reason: why they stay.
        """
        ids = ids[ids >= 0]
        if not len(ids):
            return
        index = self._reason_index.setdefault(reason, len(self.reasons))
        if index == len(self.reasons):
            self.reasons.append(reason)
            self.steps.append(self.step)
        self._reason[ids] = np.where(self._reason[ids] < 0, index, self._reason[ids])

    def settle(self) -> None:
        """Remember which slots stay. From now on, no others are joined."""
        self._stays = self.classes()[1] >= 0

    def may_go(self, ids: np.ndarray) -> bool:
        """Whether any of ``ids`` may be removed, as far as is known since ``settle``."""
        own = ids[ids >= 0]
        old = own[own < len(self._stays)]
        return len(old) < len(own) or not self._stays[old].all()

    def classes(self) -> tuple[np.ndarray, np.ndarray]:
        """Find the classes of all slots.

        Returns:
            The root of every slot, and the number of the reason why its class stays (-1 if it is free),
            each int64 ``[slots]``.
        """
        roots = self.find(np.arange(self._size, dtype=np.int64))
        worst = len(self.reasons)
        first = np.full(len(roots), worst, np.int64)
        reason = self._reason[: self._size]
        given = reason >= 0
        np.minimum.at(first, roots[given], reason[given].astype(np.int64))
        first[first == worst] = -1
        return roots, first[roots]


def _grown(array: np.ndarray, size: int) -> np.ndarray:
    """``array`` if ``size`` elements fit, else a copy with room for twice as many."""
    if size <= len(array):
        return array
    room = np.empty(2 * size, array.dtype)
    room[: len(array)] = array
    return room
