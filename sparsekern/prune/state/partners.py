"""The channel that can replace another one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Partners:
    """For every channel, the more salient channel of its group that is most similar.

    Attributes:
        channel: int64 ``[C]``, that channel, -1 for none.
        cosine: float64 ``[C]``, cosine of the two effective filters.
        coefficient: float64 ``[C]``; the channel is about ``coefficient`` times its partner.
    """

    channel: np.ndarray
    cosine: np.ndarray
    coefficient: np.ndarray
