"""The comparisons of :mod:`sparsekern.kernels.selfcheck.comparison` as assertions."""

from __future__ import annotations

from torch import Tensor

from sparsekern.kernels.selfcheck.comparison import differing, step_difference
from sparsekern.kernels.selfcheck.problems import Problem


def assert_elementwise(name: str, got: Tensor, want: Tensor, allowed: Tensor | float) -> None:
    """Equal within `allowed` in every element; NaN and infinities in the same places."""
    text = differing(name, got.double(), want.double(), allowed)
    assert text is None, text


def assert_equal_step(got: Problem, want: Problem, before: Problem) -> None:
    """Two backends made `got` and `want` from `before` in one call: exact results are equal, others are near.

    Nothing was written around the views.
    """
    text = step_difference(got, want, before)
    assert text is None, text
