"""Tables of a graph for the terminal: cost, kept channels and sensitivity of its groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table
from rich.text import Text

from sparsekern.graph import ChannelGraph

SHARES = (0.25, 0.5, 0.75)
BAR = 24


@dataclass(frozen=True)
class Sensitivity:
    """Cost of a group and saliency of its channels.

    Attributes:
        name: name of the group.
        channels: number of channels.
        params, macs: shares of the network's parameters and MACs that all channels of the group take.
        lost: share of the group's saliency that is lost with its least salient channels, by the share of
            removed channels.
    """

    name: str
    channels: int
    params: float
    macs: float
    lost: dict[float, float]


def sensitivities(graph: ChannelGraph, saliency: np.ndarray) -> list[Sensitivity]:
    """The sensitivity of every group for ``saliency``, float64 ``[C]``."""
    everything = graph.all_channels()
    whole = graph.cost(everything)
    found = []
    for group in graph.groups:
        without = everything.copy()
        without[group.channels] = False
        left = graph.cost(without)
        own = np.sort(saliency[group.channels])
        total = max(float(own.sum()), 1e-30)
        lost = {share: float(own[: round(share * len(own))].sum()) / total for share in SHARES}
        found.append(
            Sensitivity(
                group.name,
                len(own),
                1 - left.params / max(whole.params, 1),
                1 - left.macs / max(whole.macs, 1),
                lost,
            )
        )
    return found


def sensitivity_table(rows: Sequence[Sensitivity], what: str) -> Table:
    """A table of sensitivities; ``what`` is the name of the saliency in the title."""
    title = f"What groups cost, and how much of their {what} goes with their least"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("group")
    for name in ("channels", "params", "MACs", *(f"{share:.0%}" for share in SHARES)):
        table.add_column(name, justify="right")
    for row in rows:
        lost = (_graded(row.lost[share], share) for share in SHARES)
        table.add_row(row.name, str(row.channels), f"{row.params:.1%}", f"{row.macs:.1%}", *lost)
    return table


def _graded(lost: float, share: float) -> Text:
    """The lost share as text; green if the channels carry much less saliency than their share."""
    ratio = lost / share
    return Text(f"{lost:.1%}", style="green" if ratio < 0.5 else "yellow" if ratio < 0.8 else "")


def kept_table(graph: ChannelGraph, kept: np.ndarray, title: str = "Channels kept") -> Table:
    """The kept channels of every group (``kept``: bool ``[C]``) with bars, and the cost of the network."""
    everything = graph.all_channels()
    whole, left = graph.cost(everything), graph.cost(kept)
    table = Table(title=title, title_justify="left", title_style="bold", show_footer=True)
    table.add_column("group", footer="parameters\nMACs")
    shares = f"{left.params / max(whole.params, 1):.1%}\n{left.macs / max(whole.macs, 1):.1%}"
    table.add_column("kept", justify="right", footer=shares)
    table.add_column("of", footer=f"{whole.params:,}\n{whole.macs:,}")
    table.add_column("", no_wrap=True)
    for group in graph.groups:
        count, size = int(kept[group.channels].sum()), len(group.channels)
        table.add_row(group.name, str(count), str(size), _bar(count / size))
    return table


def _bar(share: float) -> Text:
    full = round(share * BAR)
    return Text("█" * full, style="blue").append("░" * (BAR - full), style="dim")
