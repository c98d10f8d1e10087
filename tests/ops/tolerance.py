"""How far a backend may be from the reference, with the reasons, and the comparison that uses it."""

from __future__ import annotations

import torch
from ops.cases import Problem
from torch import Tensor

from sparsekern._rows import COUNT, DOT, GRAD_SQ, WEIGHT_SQ

# Units in the last place of the larger of an element before and after the step. The order of the
# operations is specified, none is contracted and each is rounded correctly, so results are the same
# bits. In float64 torch's square root and `pow` (in the bias correction) may miss the last bit.
UPDATE_ULPS = {torch.float32: 0.0, torch.float64: 4.0, torch.bfloat16: 0.0, torch.float16: 0.0}

# Float32 sums over a row in any order: n terms in sequence err by about sqrt(n) / 2 roundings; 4
# times that never occurs by chance. Relative to the sum of the absolute values, of which
# norm * norm is a bound. Float64 tensors are summed in float64, and one rounding is left.
SUM_ROUNDINGS = 2.0

# A mean is blended with three roundings in float32.
BLEND_ROUNDINGS = 3.0

# A threshold depends on two square roots of sums: half of their error each, from the row's own and
# the tensor's.
THRESHOLD_ROUNDINGS = 2.0 * SUM_ROUNDINGS

EPS = torch.finfo(torch.float32).eps


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
    """One call made of `before` the Problems `got` and `want`; they are equal where they may not
    differ and near elsewhere, and nothing was written around the views.
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
    """Elements of every row, 0 where a sum is exact to the last rounding."""
    sizes = torch.zeros(len(problem.arrays["penalty"].view), dtype=torch.float64)
    for param, start, dim in zip(problem.params, problem.starts, problem.dims, strict=True):
        if start >= 0 and param.numel() and param.dtype != torch.float64:
            rows = param.shape[dim]
            sizes[start : start + rows] = param.numel() // rows
    return sizes
