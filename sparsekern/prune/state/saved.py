"""Saved states of a network's channels: which channels they have, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparsekern.graph import ChannelGraph
from sparsekern.kernels.rows import RowTable
from sparsekern.prune.state.activations import Activations
from sparsekern.prune.state.schema import STATE, check_countdowns, counted_rule, rows_rule
from sparsekern.prune.state.statistics import ChannelRows

CUT = 3
"""State of a channel that was cut out of the live network, besides the states of :mod:`masking`."""


def kept_by(
    state: Mapping[str, Any], graph: ChannelGraph, rows: ChannelRows, activations: Activations
) -> np.ndarray:
    """The channels of a network (bool ``[C]``) that the network of ``state`` also has.

    Args:
        state: a result of :meth:`Network.state_dict`.
        graph: the channels of the network at its present size.
        rows: their rows.
        activations: the network's fused normalisations.

    Raises:
        ValueError: the state belongs to another network, or to this one at a larger size.
    """
    STATE.check(state, "state")
    channels = state["channels"].cpu().numpy()
    if channels.shape != (rows.total,) or not np.isin(channels, range(CUT + 1)).all():
        raise ValueError(
            f"state['channels']: got {channels.dtype}{list(channels.shape)}, expected the states of "
            f"{rows.total} channels"
        )
    ours = np.zeros(rows.total, bool)
    ours[rows.numbers] = True
    lost = int(((channels != CUT) & ~ours).sum())
    if lost:
        raise ValueError(
            f"state: got {lost} channels that have been cut out of this model since, expected none; load the "
            f"state into a model of full size with a Pruner of its own"
        )
    kept = channels[rows.numbers] != CUT
    # Each of these calls raises if the state does not fit; nothing has changed yet.
    graph.restrict(kept)
    expected = rows.restricted_state(kept)
    rows_rule(expected).check(state["rows"], "state['rows']")
    RowTable.check(state["rows"], expected)
    of_rows = rows.kept_rows(kept)
    check_countdowns(
        channels[rows.numbers],
        state["rows"]["countdown"],
        rows.channel_of[of_rows],
        rows.is_gate[of_rows],
        rows.block_of[of_rows],
    )
    if activations.counting:
        counted = activations.restricted_state(kept)
        Activations.check(state.get("activations"), counted)
        counted_rule(counted).check(state["activations"], "state['activations']")
    return kept
