"""The comparison of a backend with the reference, within :mod:`sparsekern.kernels.backends.tolerance`."""

from __future__ import annotations

import torch
from kernels.cases import Problem
from torch import Tensor

from sparsekern.kernels.backends.tolerance import (
    BLEND_ROUNDINGS,
    EPS,
    SUM_ROUNDINGS,
    THRESHOLD_ROUNDINGS,
    UPDATE_ULPS,
)
from sparsekern.kernels.rows import COUNT, DOT, GRAD_SQ, WEIGHT_SQ


def assert_elementwise(name: str, got: Tensor, want: Tensor, allowed: Tensor | float) -> None:
    """Equal within `allowed` in every element; NaN and infinities in the same places."""
    got, want = got.double(), want.double()
    same = (got == want) | (got.isnan() & want.isnan())
    far = ~(same | ((got - want).abs() <= allowed))
    if bool(far.any()):
        at = tuple(far.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(far.sum())} of {far.numel()} elements differ, the first at {at}: "
            f"got {got[at].item()!r}, want {want[at].item()!r}"
        )


def assert_equal_step(got: Problem, want: Problem, before: Problem) -> None:
    """Two backends made `got` and `want` from `before` in one call: exact results are equal, others are near.

    Nothing was written around the views.
    """
    for (name, mine), theirs, old in zip(
        got.entries().items(), want.entries().values(), before.entries().values(), strict=True
    ):
        assert mine.outside_is_untouched(), f"{name}: written outside of the view"
        if name not in got.arrays:
            ulps = UPDATE_ULPS[mine.view.dtype] * torch.finfo(mine.view.dtype).eps
            size = torch.maximum(old.view.double().abs(), theirs.view.double().abs())
            assert_elementwise(name, mine.view, theirs.view, ulps * size.nan_to_num(0))
    _assert_equal_arrays(got, want)


def _assert_equal_arrays(got: Problem, want: Problem) -> None:
    mine = {name: guarded.view for name, guarded in got.arrays.items()}
    theirs = {name: guarded.view for name, guarded in want.arrays.items()}
    for name in ("penalty", "elements", "countdown", "nonfinite", "pending"):
        assert_elementwise(name, mine[name], theirs[name], 0.0)
    sums = theirs["sums"].double()
    roundings = EPS * (1 + SUM_ROUNDINGS * _row_sizes(want).sqrt())
    both = (sums[:, GRAD_SQ] * sums[:, WEIGHT_SQ]).sqrt()
    for column, size in {COUNT: 0.0 * both, DOT: both}.items() | {
        GRAD_SQ: sums[:, GRAD_SQ],
        WEIGHT_SQ: sums[:, WEIGHT_SQ],
    }.items():
        assert_elementwise(f"sums[:, {column}]", mine["sums"][:, column], sums[:, column], roundings * size)
    activity = theirs["activity"].double()
    assert_elementwise("activity", mine["activity"], activity, BLEND_ROUNDINGS * EPS * activity)
    threshold = theirs["threshold"].double()
    roundings = EPS * (1 + THRESHOLD_ROUNDINGS * _row_sizes(want).sqrt())
    assert_elementwise("threshold", mine["threshold"], threshold, roundings * threshold)


def _row_sizes(problem: Problem) -> Tensor:
    """Number of elements of every row; 0 where the sum must be exact."""
    sizes = torch.zeros(len(problem.arrays["penalty"].view), dtype=torch.float64)
    for param, start, dim in zip(problem.params, problem.starts, problem.dims, strict=True):
        if start >= 0 and param.numel() and param.dtype != torch.float64:
            rows = param.shape[dim]
            sizes[start : start + rows] = param.numel() // rows
    return sizes
