"""Slots and the classes they form: a union-find over flat integer arrays.

A slot is one index along one dimension of one parameter or buffer. Values that flow through the
network carry, for each dimension, an array of slot ids; ``STAYS`` marks an index that can never
be removed.
"""

from __future__ import annotations

import numpy as np

STAYS = -1


class Slots:
    """Union-find whose every operation takes whole arrays.

    The smaller root always wins, so the result does not depend on the order of the operations.
    Frozen slots remember the first reason that was given for them; a class is frozen as soon as
    one of its slots is.
    """

    def __init__(self) -> None:
        # Grown by doubling; what lies behind the ids that were allocated has no meaning.
        self._parent = np.empty(1024, np.int64)
        self._reason = np.empty(1024, np.int32)
        self._starts = np.empty(64, np.int64)
        self._size = 0
        self._owners: list[tuple[int, int]] = []
        self._reason_index: dict[str, int] = {}
        self.reasons: list[str] = []

    def __len__(self) -> int:
        return self._size

    def allocate(self, owner: tuple[int, int], count: int) -> np.ndarray:
        """Fresh ids for the ``count`` indices of ``owner`` = (tensor number, dimension)."""
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

    def owners(self, ids: np.ndarray) -> list[tuple[int, int]]:
        """The (tensor, dimension) pairs that the raw ids were allocated for, each once."""
        where = np.unique(self._where(ids[ids >= 0]))
        return [self._owners[i] for i in where]

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tensor number, dimension and index of every raw id (all must be >= 0)."""
        where = self._where(ids)
        owners = np.asarray(self._owners, np.int64).reshape(-1, 2)[where]
        return owners[:, 0], owners[:, 1], ids - self._starts[where]

    def _where(self, ids: np.ndarray) -> np.ndarray:
        """The number of the allocation of every raw id."""
        return np.searchsorted(self._starts[: len(self._owners)], ids, side="right") - 1

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The root of every id, in the shape of ``ids``; ``STAYS`` maps to itself."""
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
        """Join slots pairwise; a slot that meets ``STAYS`` is frozen for ``reason``."""
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
            # Several pairs may hang the same root; the smallest wins and the loop joins the rest.
            np.minimum.at(self._parent, np.maximum(left, right), np.minimum(left, right))

    def freeze(self, ids: np.ndarray, reason: str) -> None:
        """Slots that must stay; those frozen before keep their first reason."""
        ids = ids[ids >= 0]
        if not len(ids):
            return
        index = self._reason_index.setdefault(reason, len(self.reasons))
        if index == len(self.reasons):
            self.reasons.append(reason)
        self._reason[ids] = np.where(self._reason[ids] < 0, index, self._reason[ids])

    def classes(self) -> tuple[np.ndarray, np.ndarray]:
        """Root of every slot and, for every slot, the reason number of its class (-1: free)."""
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
