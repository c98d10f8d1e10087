"""The picture of the study: Dice against the dense network over the budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from benchmarks.method.statistics import describe
from benchmarks.method.tables import Table
from sparsekern.files.atomic import replacing
from sparsekern.report.runs import BLUE, GREY, ORANGE, SKY, STYLE

COLOURS = {"default": ORANGE, "narrow": BLUE, "fresh": SKY, "random": GREY}
SPREAD = 1.03  # factor between the budgets of neighbouring arms, so that their intervals lie side by side


def draw(tables: Sequence[Table], path: Path) -> None:
    """Write the picture as PNG.

    Args:
        tables: of one network, one for each budget.
        path: the file.

    Raises:
        OSError: the file cannot be written.
    """
    with matplotlib.rc_context(STYLE), replacing(path) as temporary:
        figure_of(tables).savefig(temporary, format="png")


def figure_of(tables: Sequence[Table]) -> Figure:
    """One panel for each set, and one for their mean."""
    sets = [name for name in tables[0].sets if all(name in table.sets for table in tables)]
    figure = Figure(figsize=(2.6 * (len(sets) + 1), 3.4))
    panels = figure.subplots(1, len(sets) + 1)
    for panel, name in zip(panels, [*sets, None], strict=True):
        _panel(panel, tables, sets if name is None else [name])
        panel.set_title(name or "mean of the sets")
    panels[0].set_ylabel("Dice minus dense")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLOURS))
    return figure


def _panel(axes: Axes, tables: Sequence[Table], sets: Sequence[str]) -> None:
    axes.axhline(0, color="black", linewidth=0.8)
    for position, (arm, colour) in enumerate(COLOURS.items()):
        points = []
        for table in tables:
            differences = table.over_sets([table.paired(arm, "dense", name) for name in sets])
            if differences:
                points.append((table.keep * SPREAD**position, describe(differences)))
        if not points:
            continue
        keeps, found = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        means = [one.mean for one in found]
        reach = [[one.mean - one.low for one in found], [one.high - one.mean for one in found]]
        axes.errorbar(keeps, means, reach, color=colour, label=arm, marker="o", markersize=4, capsize=2)
    axes.set_xscale("log")
    axes.set_xticks([table.keep for table in tables])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("share of the MACs")
