"""Comparing the results of a backend with the reference, within the common tolerances of all backends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparsekern.bench.problem import Problem
from sparsekern.kernels import backends
from sparsekern.kernels.backends.tolerance import BLEND_ROUNDINGS, EPS, SUM_ROUNDINGS, UPDATE_ULPS
from sparsekern.kernels.rows import GRAD_SQ, ROW_ARRAYS, WEIGHT_SQ, RowTable
from sparsekern.kernels.selfcheck.comparison import arrays_difference, differing


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


def _table_difference(got: RowTable, want: RowTable) -> str | None:
    """The first difference between two row tables; None if they agree."""
    sizes = torch.zeros_like(want.elements, dtype=torch.float64)
    for view in want.views:
        sizes[view.slice] = view.param.numel() / max(1, view.rows)
    mine, theirs = ({name: getattr(table, name) for name in ROW_ARRAYS} for table in (got, want))
    if text := arrays_difference(mine, theirs, sizes):
        return text
    sums = want.sums.double()
    both = (sums[:, GRAD_SQ] * sums[:, WEIGHT_SQ]).sqrt()
    bounds = {"updates": 0.0} | _moment_bounds(want, both, EPS * (1 + SUM_ROUNDINGS * sizes.sqrt()) * both)
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
