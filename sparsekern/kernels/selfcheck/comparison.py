"""The comparison of two results, within :mod:`sparsekern.kernels.backends.tolerance`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sparsekern.kernels.backends.tolerance import (
    BLEND_ROUNDINGS,
    EPS,
    SUM_ROUNDINGS,
    THRESHOLD_ROUNDINGS,
    UPDATE_ULPS,
)
from sparsekern.kernels.rows import COUNT, DOT, GRAD_SQ, WEIGHT_SQ, ChannelArrays
from sparsekern.kernels.selfcheck.problems import Problem

# A dot of a channel is a float32 sum over a few gates.
_MOMENTS = 1e-6


def differing(name: str, got: Tensor, want: Tensor, allowed: Tensor | float) -> str | None:
    """A text on the elements that differ by more than ``allowed``; None if there are none.

    NaN equals NaN, and an infinity equals the same infinity.

    Args:
        name: name of the tensor, for the text.
        got, want: two tensors; their dtypes may differ.
        allowed: largest difference that is no fault, for all elements or for each.
    """
    if got.shape != want.shape:
        return f"{name}: got {list(got.shape)}, expected {list(want.shape)}"
    if got.dtype is want.dtype and torch.equal(got, want):
        return None
    got, want = got.double(), want.double()
    same = (got == want) | (got.isnan() & want.isnan()) | ((got - want).abs() <= allowed)
    far = (~same).nonzero()
    if not len(far):
        return None
    at = tuple(far[0].tolist())
    largest = (got - want).abs()[~same].nan_to_num(float("inf"), float("inf")).max().item()
    values = f"got {got[at].item():.9g}, expected {want[at].item():.9g}"
    return (
        f"{name}: {len(far)} of {got.numel()} elements differ by up to {largest:.3g}, "
        f"the first at {list(at)}: {values}"
    )


def step_difference(got: Problem, want: Problem, before: Problem) -> str | None:
    """The first difference between two problems that two backends made from ``before`` in one call.

    Args:
        got: result of the examined backend, on the CPU.
        want: result of the reference.
        before: the problem before the call.

    Returns:
        A text on the first fault; None if exact results are equal, others are near, and nothing was written
        around a view.
    """
    if _have_same_bits(got, want):
        return None
    for (name, mine), theirs, old in zip(
        got.entries().items(), want.entries().values(), before.entries().values(), strict=True
    ):
        if not mine.outside_is_untouched():
            return f"{name}: elements outside of the tensor were written"
        if name not in got.arrays:
            ulps = UPDATE_ULPS[mine.view.dtype] * torch.finfo(mine.view.dtype).eps
            size = torch.maximum(old.view.double().abs(), theirs.view.double().abs())
            if text := differing(name, mine.view, theirs.view, ulps * size.nan_to_num(0)):
                return text
    mine_arrays = {name: guarded.view for name, guarded in got.arrays.items()}
    their_arrays = {name: guarded.view for name, guarded in want.arrays.items()}
    return arrays_difference(mine_arrays, their_arrays, _row_sizes(want))


def _have_same_bits(got: Problem, want: Problem) -> bool:
    """Whether all buffers are equal bit for bit, poison included."""
    return all(
        torch.equal(mine.buffer.view(torch.uint8), theirs.buffer.view(torch.uint8))
        for mine, theirs in zip(got.entries().values(), want.entries().values(), strict=True)
    )


def arrays_difference(got: Mapping[str, Tensor], want: Mapping[str, Tensor], sizes: Tensor) -> str | None:
    """The first difference between the arrays of two row tables; None if they agree.

    Sums may be added in any order, which gives their error bounds. All other values must be equal.

    Args:
        got, want: the arrays by name, with those of ``ROW_ARRAYS`` among them.
        sizes: float64 ``[R]``; number of elements of every row, 0 where a sum must be exact.
    """
    for name, mine, theirs, allowed in _bounded(got, want, sizes):
        if text := differing(name, mine, theirs, allowed):
            return text
    return None


def _bounded(
    got: Mapping[str, Tensor], want: Mapping[str, Tensor], sizes: Tensor
) -> Iterator[tuple[str, Tensor, Tensor, Tensor | float]]:
    """Pairs of arrays with their names and allowed differences."""
    for name in ("penalty", "elements", "countdown", "nonfinite", "pending"):
        yield name, got[name], want[name], 0.0
    sums = want["sums"].double()
    roundings = EPS * (1 + SUM_ROUNDINGS * sizes.sqrt())
    both = (sums[:, GRAD_SQ] * sums[:, WEIGHT_SQ]).sqrt()
    magnitudes = {COUNT: 0.0 * both, DOT: both, GRAD_SQ: sums[:, GRAD_SQ], WEIGHT_SQ: sums[:, WEIGHT_SQ]}
    for column, magnitude in magnitudes.items():
        name = f"sums[:, {column}]"
        yield name, got["sums"][:, column], want["sums"][:, column], roundings * magnitude
    yield "activity", got["activity"], want["activity"], BLEND_ROUNDINGS * EPS * want["activity"].double()
    threshold = want["threshold"].double()
    roundings = EPS * (1 + THRESHOLD_ROUNDINGS * sizes.sqrt())
    yield "threshold", got["threshold"], want["threshold"], roundings * threshold


def moments_difference(got: ChannelArrays, want: ChannelArrays) -> str | None:
    """The first difference between the means per channel of two backends; None if they agree."""
    for name, mine, theirs in zip(want._fields[:-1], got[:-1], want[:-1], strict=True):
        allowed = _MOMENTS * (1 + theirs.double().abs()) if theirs.is_floating_point() else 0.0
        if text := differing(name, mine, theirs, allowed):
            return text
    return None


def _row_sizes(problem: Problem) -> Tensor:
    """Number of elements of every row; 0 where the sum must be exact."""
    penalty = problem.arrays["penalty"].view
    sizes = torch.zeros(len(penalty), dtype=torch.float64, device=penalty.device)
    for param, start, dim in zip(problem.params, problem.starts, problem.dims, strict=True):
        if start >= 0 and param.numel() and param.dtype != torch.float64:
            rows = param.shape[dim]
            sizes[start : start + rows] = param.numel() // rows
    return sizes
