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
        self._parent = np.empty(0, np.int64)
        self._reason = np.empty(0, np.int32)
        self._starts: list[int] = []
        self._owners: list[tuple[int, int]] = []
        self._reason_index: dict[str, int] = {}
        self.reasons: list[str] = []

    def __len__(self) -> int:
        return len(self._parent)

    def allocate(self, owner: tuple[int, int], count: int) -> np.ndarray:
        """Fresh ids for the ``count`` indices of ``owner`` = (tensor number, dimension)."""
        start = len(self._parent)
        ids = np.arange(start, start + count, dtype=np.int64)
        self._parent = np.concatenate([self._parent, ids])
        self._reason = np.concatenate([self._reason, np.full(count, -1, np.int32)])
        self._starts.append(start)
        self._owners.append(owner)
        return ids

    def owners(self, ids: np.ndarray) -> list[tuple[int, int]]:
        """The (tensor, dimension) pairs that the raw ids were allocated for, each once."""
        ids = ids[ids >= 0]
        where = np.unique(np.searchsorted(self._starts, ids, side="right") - 1)
        return [self._owners[i] for i in where]

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tensor number, dimension and index of every raw id (all must be >= 0)."""
        where = np.searchsorted(self._starts, ids, side="right") - 1
        owners = np.asarray(self._owners, np.int64).reshape(-1, 2)[where]
        return owners[:, 0], owners[:, 1], ids - np.asarray(self._starts, np.int64)[where]

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
        roots = self.find(np.arange(len(self._parent), dtype=np.int64))
        worst = len(self.reasons)
        first = np.full(len(roots), worst, np.int64)
        given = self._reason >= 0
        np.minimum.at(first, roots[given], self._reason[given].astype(np.int64))
        first[first == worst] = -1
        return roots, first[roots]
