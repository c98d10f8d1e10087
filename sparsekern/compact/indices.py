"""The indices of a dimension that stay: arrays, and runs of them as text such as ``0-3,7``."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np

from sparsekern.files.schema import describe

Indices = np.ndarray[Any, np.dtype[np.int64]]


_RUNS = re.compile(r"[0-9]{1,18}(-[0-9]{1,18})?(,[0-9]{1,18}(-[0-9]{1,18})?)*")


def check_indices(indices: object, size: int, dim: int) -> Indices:
    """The indices of dimension ``dim`` of length ``size`` as an array.

    Raises:
        ValueError: they are not at least one increasing integer in ``[0, size)``.
    """
    array = np.asarray(indices)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"keep: got {array.dtype} {list(array.shape)} for dimension {dim}, expected a list or array of "
            f"at least one integer index"
        )
    if array[0] < 0 or array[-1] >= size or (array[1:] <= array[:-1]).any():
        raise ValueError(
            f"keep: got indices of dimension {dim} that do not increase or leave the range, expected "
            f"increasing indices in [0, {size})"
        )
    if array.dtype == np.int64 and not array.flags.writeable:
        return array
    array = array.astype(np.int64)
    array.setflags(write=False)
    return array


def to_runs(indices: Indices) -> str:
    breaks = np.flatnonzero(np.diff(indices) != 1)
    firsts = indices[np.concatenate([[0], breaks + 1])].tolist()
    lasts = indices[np.concatenate([breaks, [-1]])].tolist()
    runs = zip(firsts, lasts, strict=True)
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


class Runs:
    """Increasing indices as text; the array is made when the size of a tensor is known."""

    def __init__(self, text: object) -> None:
        if not isinstance(text, str) or not _RUNS.fullmatch(text):
            raise ValueError(f"text: got {describe(text)} as indices, expected runs such as '0-3,7'")
        bounds = [run.partition("-") for run in text.split(",")]
        self._pairs = [(int(first), int(last or first)) for first, _, last in bounds]
        flat = [-1, *(bound for pair in self._pairs for bound in pair)]
        self._rises = all(
            before <= after if number % 2 else before < after
            for number, (before, after) in enumerate(itertools.pairwise(flat))
        )
        self.last = flat[-1]
        self.count = sum(max(0, last - first + 1) for first, last in self._pairs)
        self._array: Indices | None = None

    def within(self, size: int, dim: int) -> Indices:
        """The indices as an array, checked against ``size``; all dimensions share one array.

        Raises:
            ValueError: the indices do not increase or reach ``size``.
        """
        if not self._rises or self.last >= size:
            raise ValueError(
                f"keep: got indices of dimension {dim} that do not increase or leave the range, expected at "
                f"least one, and increasing indices in [0, {size})"
            )
        if self._array is None:
            parts = [np.arange(first, last + 1, dtype=np.int64) for first, last in self._pairs]
            self._array = check_indices(np.concatenate(parts), size, dim)
        return self._array
