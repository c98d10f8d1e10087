"""Comparing the results of a backend with the reference, within the common tolerances of all backends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparsekern.bench.problem import Problem
from sparsekern.kernels import backends
from sparsekern.kernels.backends.tolerance import (
    BLEND_ROUNDINGS,
    EPS,
    SUM_ROUNDINGS,
    THRESHOLD_ROUNDINGS,
    UPDATE_ULPS,
)
from sparsekern.kernels.rows import COUNT, DOT, GRAD_SQ, WEIGHT_SQ, RowTable


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Force all ops to use ``backend`` in the block."""
    before = os.environ.get("SPARSEKERN_BACKEND")
    os.environ["SPARSEKERN_BACKEND"] = backend
    backends.reset()
    try:
        yield
    finally:
        if before is None:
            del os.environ["SPARSEKERN_BACKEND"]
        else:
            os.environ["SPARSEKERN_BACKEND"] = before
        backends.reset()


def difference(got: Problem, want: Problem) -> str | None:
    """The first difference between two problems after one step by different backends; None if they agree."""
    for (name, mine), theirs in zip(got.tensors().items(), want.tensors().values(), strict=True):
        allowed = UPDATE_ULPS[mine.dtype] * torch.finfo(mine.dtype).eps
        if text := differing(name, mine, theirs, allowed * theirs.double().abs() if allowed else 0.0):
            return text
    if got.table is None or want.table is None:
        return None
    return _table_difference(got.table, want.table)


def differing(name: str, got: Tensor, want: Tensor, allowed: Tensor | float) -> str | None:
    """A text on the elements that differ by more than ``allowed``; None if there are none. NaN equals NaN."""
    if torch.equal(got, want):
        return None
    got, want = got.double(), want.double()
    same = (got == want) | (got.isnan() & want.isnan()) | ((got - want).abs() <= allowed)
    far = (~same).flatten().nonzero()
    if not len(far):
        return None
    at = int(far[0])
    values = f"{got.flatten()[at].item():.9g}, expected {want.flatten()[at].item():.9g}"
    return f"{name}: {len(far)} of {got.numel()} elements are wrong, the first is {values}"


def _table_difference(got: RowTable, want: RowTable) -> str | None:
    """The first difference between two row tables; None if they agree.

    Sums may be added in any order, which gives their error bounds. All other values must be equal.
    """
    sizes = torch.zeros_like(want.elements, dtype=torch.float64)
    for view in want.views:
        sizes[view.slice] = view.param.numel() / max(1, view.rows)
    sums = want.sums.double()
    roundings = EPS * (1 + SUM_ROUNDINGS * sizes.sqrt())
    both = (sums[:, GRAD_SQ] * sums[:, WEIGHT_SQ]).sqrt()
    bounds: dict[str, Tensor | float] = dict.fromkeys(("penalty", "elements", "countdown", "pending"), 0.0)
    bounds |= {"nonfinite": 0.0, "updates": 0.0}
    bounds["activity"] = BLEND_ROUNDINGS * EPS * want.activity.double()
    bounds["threshold"] = EPS * (1 + THRESHOLD_ROUNDINGS * sizes.sqrt()) * want.threshold.double()
    bounds |= _moment_bounds(want, both, roundings * both)
    for column, size in {COUNT: 0.0 * both, DOT: both, GRAD_SQ: sums[:, 2], WEIGHT_SQ: sums[:, 3]}.items():
        name = f"sums[:, {column}]"
        if text := differing(name, got.sums[:, column], want.sums[:, column], roundings * size):
            return text
    for name, allowed in bounds.items():
        if text := differing(name, getattr(got, name), getattr(want, name), allowed):
            return text
    return None


def _moment_bounds(table: RowTable, size: Tensor, error: Tensor) -> dict[str, Tensor | float]:
    """Error bounds of the means per channel; ``size`` bounds the dot of a row, ``error`` bounds its error."""
    offsets = table.gate_offsets
    counts = offsets.diff()

    def of_channels(values: Tensor) -> Tensor:
        return torch.segment_reduce(values[table.gate_rows], "sum", offsets=offsets, initial=0)

    total = of_channels(size)
    off = of_channels(error) + EPS * counts * total
    fresh = 1 - table.decay
    rounding = BLEND_ROUNDINGS * EPS
    mean = fresh * off + rounding * (table.channel_dot.double().abs() + fresh * total)
    square = fresh * (2 * total + off) * off + rounding * (table.channel_dot_sq.double() + fresh * total**2)
    return {"channel_dot": mean, "channel_dot_sq": square}
