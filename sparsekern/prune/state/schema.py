"""Rules for the form of a Pruner's saved state, as data.

All checks run before anything changes. The rule of every network (:data:`STATE`) comes first, then the rules
for a given network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekern.files.schema import (
    NOTHING,
    PLAIN,
    TEXT,
    Anything,
    Array,
    Either,
    Entries,
    Fields,
    Items,
    Kind,
    OneOf,
    Real,
    Rule,
    Whole,
)
from sparsekern.kernels.rows import COUNT, GRAD_SQ, WEIGHT_SQ
from sparsekern.kernels.rows import LIVE as LIVE_ROW
from sparsekern.prune.state.masking import FADING, MASKED

STATE_VERSION = 3

_VECTOR = Array(dtype=torch.float32, ndim=1)
# Rounding may lift a mean of shares above 1.
_SHARE: dict[str, Any] = {"low": 0.0, "high": 1.001, "nan": False}
_SIZE: dict[str, Any] = {"low": 0.0, "nan": False, "infinite": False}
_FINITE: dict[str, Any] = {"nan": False, "infinite": False}

ROW_VALUES: dict[str, dict[str, Any]] = {
    "penalty": _SIZE,
    "countdown": {"low": LIVE_ROW},
    "threshold": {"low": 0.0, "nan": False},
    "activity": _SHARE,
    "nonfinite": {"low": 0.0},
    "channel_dot": _FINITE,
    "channel_dot_sq": _SIZE,
    "updates": _SIZE,
}
"""Allowed elements of the arrays of a :class:`~sparsekern.kernels.rows.RowTable`."""

COUNT_VALUES: dict[str, dict[str, Any]] = {
    "threshold": {"low": 0.0, "nan": False},
    "activity": _SHARE,
    "updates": _SIZE,
}
"""Allowed elements of the arrays of :class:`~sparsekern.prune.state.activations.Activations`."""

COUNTED = Fields({"threshold": _VECTOR, "activity": _VECTOR, "updates": _VECTOR})
"""Counts of the fused normalisations of one process."""

STATE = Fields(
    {
        "version": OneOf((STATE_VERSION,)),
        "settings": Entries(TEXT, Either((PLAIN, Items(PLAIN)))),
        "schedule": Anything(),
        "network": Items(TEXT),
        "step": Whole(0),
        "next": Either((NOTHING, Whole(1))),
        "nonfinite_seen": Whole(0),
        "channels": Array(dtype=torch.int8, ndim=1),
        "rows": Kind(dict),
    },
    {"activations": COUNTED},
)
"""``Pruner.state_dict()`` of any network."""


@dataclass(frozen=True)
class Sums(Array):
    """Sums over the elements of each row; only ``dot`` can be negative."""

    def check(self, value: Any, name: str) -> None:
        super().check(value, name)
        if bool((value[:, [COUNT, GRAD_SQ, WEIGHT_SQ]] < 0).any()):
            raise ValueError(f"{name}: got a negative count or sum of squares, expected numbers >= 0")


def rows_rule(expected: Mapping[str, Any]) -> Rule:
    """The rule for the state of a table of rows with the shapes and dtypes of ``expected``."""
    arrays = _arrays({name: own for name, own in expected.items() if isinstance(own, Tensor)}, ROW_VALUES)
    sums = Sums(tuple(expected["sums"].shape), expected["sums"].dtype, nan=False, infinite=False)
    return Fields({"tau": Real(positive=True), "decay": Real(0, 1), **arrays, "sums": sums})


def counted_rule(expected: Mapping[str, Tensor]) -> Rule:
    """The rule for counts of normalisations with the shapes and dtypes of ``expected``."""
    return Fields(_arrays(expected, COUNT_VALUES))


def _arrays(expected: Mapping[str, Tensor], values: Mapping[str, Mapping[str, Any]]) -> dict[str, Rule]:
    return {
        name: Array(tuple(own.shape), own.dtype, **values.get(name, {})) for name, own in expected.items()
    }


def check_countdowns(
    channels: np.ndarray,
    countdowns: Tensor,
    channel_of: np.ndarray,
    is_gate: np.ndarray,
    block_of: np.ndarray,
) -> None:
    """Check that the countdowns of rows agree with the states of their channels.

    Args:
        channels: int8 ``[C]``; states as in :mod:`sparsekern.prune.state.masking`.
        countdowns: int32 ``[R]``.
        channel_of: int64 ``[R]``; -1 for the rows of no channel.
        is_gate: bool ``[R]``.
        block_of: int64 ``[R]``; the channels of the blocks whose writers have the rows, or -1.

    Raises:
        ValueError: the countdown of a row does not fit the state of its channel.
    """
    countdown = countdowns.cpu().numpy()
    state, of_block = (np.append(channels, -1)[owner] for owner in (channel_of, block_of))
    masked = (state == MASKED) | (of_block == MASKED)
    declining = (((state == FADING) & is_gate) | (of_block == FADING)) & ~masked
    low = np.where(declining | masked, 0, LIVE_ROW)
    high = np.where(declining, np.iinfo(np.int32).max, low)
    wrong = np.flatnonzero((countdown < low) | (countdown > high))
    if len(wrong):
        row = wrong[0]
        expected = f"{low[row]}" if low[row] == high[row] else f"at least {low[row]}"
        raise ValueError(
            f"state['rows']['countdown']: got {countdown[row]} for row {row} ({len(wrong)} rows differ), "
            f"expected {expected} by the state of its channel"
        )
