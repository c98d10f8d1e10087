"""Roofline plot of a report: bytes per second over bytes per call, below the two limits of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsekern.bench.comparison import OURS
from sparsekern.bench.suite import Report, Result
from sparsekern.files.atomic import replacing
from sparsekern.report.runs import BLUE, GREY, MISSED, ORANGE, SKY, STYLE

_COLOURS = {OURS: BLUE, "torch fused": ORANGE, "torch foreach": GREY, "reference": SKY}
_MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^"}


def draw(report: Report, path: Path) -> None:
    """Write a picture with one point for each candidate of each case.

    The flat roof is the bandwidth of the stream. The slope is the rate of a call that takes as
    long as the shortest measured call; it limits calls that move few bytes.

    Args:
        report: the results.
        path: the file to write; its suffix gives the format.

    Raises:
        ValueError: no timed case is limited by memory; nothing is written.
    """
    found = [result for result in report.results if result.gb_per_s]
    if not found:
        raise ValueError("--plot: no case was timed that memory limits, expected one at least")
    with rc_context(STYLE):
        figure = Figure(figsize=(12, 5.5))
        axes = figure.add_subplot()
        _points(axes, found)
        _roofs(axes, report, found)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("bytes that a call has to move")
        axes.set_ylabel("GB/s")
        where = report.environment
        axes.set_title(
            f"{where['machine']} ({where['isa']}), {where['threads']} threads, torch {where['torch']}"
        )
        figure.legend(loc="outside right center")
        with replacing(path, "--plot") as temporary:
            figure.savefig(temporary)


def _points(axes: Axes, found: Sequence[Result]) -> None:
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for result in found:
        dtype = str(result.case.dtype).removeprefix("torch.")
        for candidate, rate in result.gb_per_s.items():
            points.setdefault((_name(result, candidate), dtype), []).append((result.moved[candidate], rate))
    for (name, dtype), pairs in sorted(points.items()):
        across, up = zip(*pairs, strict=True)
        colour, marker = _COLOURS.get(name, MISSED), _MARKERS.get(dtype, "D")
        label = f"{name}, {dtype}"
        axes.scatter(across, up, s=24, c=colour, marker=marker, label=label, alpha=0.8, zorder=3)


def _name(result: Result, candidate: str) -> str:
    """A candidate's name in the legend; sparsekern's reference backend is shown as the reference."""
    return "reference" if candidate == OURS and result.case.backend == "reference" else candidate


def _roofs(axes: Axes, report: Report, found: Sequence[Result]) -> None:
    moved = [value for result in found for value in result.moved.values()]
    across = np.geomspace(min(moved) / 2, 2 * max(moved), 100)
    fastest = min(result.seconds[OURS].median for result in found)
    for device, rate in report.stream_gb_per_s.items():
        roof = np.minimum(rate.median, 1e-9 * across / fastest)
        text = f"stream on the {device}, {rate.median:.0f} GB/s;\nshortest call, {1e6 * fastest:.0f} µs"
        axes.plot(across, roof, color="black", linewidth=1, label=text)
