"""Statistics of paired differences: a bootstrap interval, and a p-value by sign flips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EXACT = 6  # up to this number of differences, all resamples are used: 6^6 means
DRAWS = 50_000  # number of resamples of more differences
FLIPS = 20  # largest number of differences whose signs are flipped


@dataclass(frozen=True)
class Difference:
    """Paired differences, one a seed.

    Attributes:
        mean: of the differences.
        low, high: ends of the percentile bootstrap interval of the mean over seeds, 95 %.
        p: exact two-sided probability of a mean as far from 0 if every difference had either sign by chance.
        count: number of seeds.
    """

    mean: float
    low: float
    high: float
    p: float
    count: int


def describe(differences: Sequence[float]) -> Difference:
    """Raises ValueError where there is no difference, or one that is not finite."""
    values = np.asarray(differences, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"differences: got {list(differences)}, expected at least one finite number")
    low, high = interval(values)
    return Difference(float(values.mean()), low, high, sign_flip(values), len(values))


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; of up to `EXACT` values by all resamples there are."""
    count = len(values)
    if count <= EXACT:
        which = np.indices((count,) * count).reshape(count, -1)
    else:
        which = np.random.default_rng(0).integers(0, count, (count, DRAWS))
    means = values[which].mean(axis=0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def sign_flip(values: np.ndarray) -> float:
    """Share of all ways to set the signs whose mean is at least as far from 0 as that of `values`.

    Raises:
        ValueError: there are more than `FLIPS` values.
    """
    if len(values) > FLIPS:
        raise ValueError(f"values: got {len(values)}, expected at most {FLIPS}")
    bits = np.arange(2 ** len(values))[:, None] >> np.arange(len(values)) & 1
    means = np.abs(((1 - 2 * bits) * values).mean(axis=1))
    # Sums in another order differ by rounding.
    return float((means >= np.abs(values.mean()) - 1e-12).mean())
