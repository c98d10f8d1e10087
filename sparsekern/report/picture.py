"""A picture of a graph's groups: their connections, widths and costs.

The standard library writes the SVG, matplotlib the PNG.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from sparsekern.files.atomic import replacing
from sparsekern.graph import ChannelGraph

# The colours are from the palette of Okabe and Ito, which is safe for all kinds of colour vision.
BLUE, ORANGE, GREY, LIGHT, INK = "#0072B2", "#D55E00", "#8A8A8A", "#DDDDDD", "#222222"
ROW, FONT = 22.0, 12.0
ARCS, NAMES, WIDTHS, COSTS, MARGIN = 150.0, 230.0, 330.0, 170.0, 16.0


@dataclass(frozen=True)
class Box:
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    colour: str


@dataclass(frozen=True)
class Label:
    """A line of text; ``y`` is its middle, ``anchor`` start, middle or end."""

    x: float
    y: float
    text: str
    colour: str = INK
    anchor: str = "start"
    bold: bool = False


@dataclass(frozen=True)
class Curve:
    """A Bezier curve from (x, start) to (x, stop) that bulges to the left."""

    x: float
    start: float
    stop: float
    bulge: float
    colour: str


@dataclass
class Drawing:
    """Shapes on a white page, in pixels from its upper left corner."""

    width: float
    height: float
    curves: list[Curve] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)


def edges(graph: ChannelGraph) -> list[tuple[int, int]]:
    """Pairs of connected groups.

    A weight contracts the channels of the first group, and its rows are channels of the second group. The
    second number is ``len(graph.groups)`` where rows of the weight belong to no group.
    """
    found: dict[tuple[int, int], None] = {}
    rest = len(graph.groups)
    for group in graph.groups:
        for name, dim in group.consumers:
            slots = graph.tensors[name]
            rows = None if slots.row_dim in (None, dim) else slots.channels[slots.row_dim or 0]
            if rows is None or (rows < 0).any():
                found[group.id, rest] = None
            if rows is not None:
                for other in np.unique(graph.group_of[rows[rows >= 0]]):
                    found[group.id, int(other)] = None
    return list(found)


def draw(graph: ChannelGraph, kept: np.ndarray | None = None) -> Drawing:
    """The groups from the input down, with bars for their channels and their share of the MACs.

    Args:
        graph: the graph to show.
        kept: bool ``[C]``, channels that a plan keeps; None for all channels.
    """
    everything = graph.all_channels()
    chosen = everything if kept is None else kept
    top = MARGIN + 2 * ROW
    page = Drawing(
        ARCS + NAMES + WIDTHS + COSTS + 2 * MARGIN, top + (len(graph.groups) + 1) * ROW + 2 * MARGIN
    )
    middle = [top + (row + 0.5) * ROW for row in range(len(graph.groups) + 1)]
    left = MARGIN + ARCS
    for first, second in edges(graph):
        reach = abs(second - first)
        bulge = min(ARCS * 1.25, 14.0 + 9.0 * reach)
        colour = GREY if reach == 1 else BLUE if second > first else ORANGE
        page.curves.append(Curve(left - 6, middle[first], middle[second], bulge, colour))
    _head(page, left)
    whole = graph.cost(everything)
    widest = max((len(group.channels) for group in graph.groups), default=1)
    for group, y in zip(graph.groups, middle, strict=False):
        without = everything.copy()
        without[group.channels] = False
        share = 1 - graph.cost(without).macs / max(whole.macs, 1)
        _row(page, left, y, group.name, int(chosen[group.channels].sum()), len(group.channels), widest, share)
    page.labels.append(Label(left, middle[-1], "layers that stay, outputs", GREY))
    page.boxes.append(Box(left - 8, middle[-1] - 2, 4, 4, GREY))
    return page


def _head(page: Drawing, left: float) -> None:
    y = MARGIN + 0.5 * ROW
    page.labels.append(Label(MARGIN, y, "feeds", bold=True))
    page.labels.append(Label(left, y, "group", bold=True))
    page.labels.append(Label(left + NAMES, y, "channels", bold=True))
    page.labels.append(Label(left + NAMES + WIDTHS, y, "share of the MACs", bold=True))


def _row(
    page: Drawing, left: float, y: float, name: str, count: int, size: int, widest: int, share: float
) -> None:
    room = WIDTHS - 90
    shown = name if len(name) <= 32 else f"…{name[-31:]}"
    page.boxes.append(Box(left - 8, y - 2, 4, 4, INK))
    page.labels.append(Label(left, y, shown))
    page.boxes.append(Box(left + NAMES, y - 6, max(1.5, room * size / widest), 12, LIGHT))
    page.boxes.append(Box(left + NAMES, y - 6, max(1.5, room * count / widest), 12, BLUE))
    text = str(size) if count == size else f"{count} of {size}"
    page.labels.append(Label(left + NAMES + room * size / widest + 6, y, text))
    page.boxes.append(Box(left + NAMES + WIDTHS, y - 6, max(1.0, (COSTS - 60) * share), 12, ORANGE))
    page.labels.append(Label(left + NAMES + WIDTHS + (COSTS - 60) * share + 6, y, f"{share:.1%}"))


def write_svg(page: Drawing, path: Path) -> None:
    """Write the drawing as SVG.

    Raises:
        OSError: the file cannot be written.
    """
    size = {"width": f"{page.width:g}", "height": f"{page.height:g}"}
    box = f"0 0 {page.width:g} {page.height:g}"
    root = ElementTree.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": box, **size})
    ElementTree.SubElement(root, "rect", {"fill": "white", **size})
    for curve in page.curves:
        x, away = f"{curve.x:g}", f"{curve.x - curve.bulge:g}"
        path_data = f"M {x} {curve.start:g} C {away} {curve.start:g} {away} {curve.stop:g} {x} {curve.stop:g}"
        style = {"fill": "none", "stroke": curve.colour, "stroke-width": "1.3"}
        ElementTree.SubElement(root, "path", {"d": path_data, **style})
    for shape in page.boxes:
        place = {name: f"{getattr(shape, name):g}" for name in ("x", "y", "width", "height")}
        ElementTree.SubElement(root, "rect", {"fill": shape.colour, **place})
    for label in page.labels:
        text = ElementTree.SubElement(
            root,
            "text",
            {
                "x": f"{label.x:g}",
                "y": f"{label.y + 0.35 * FONT:g}",
                "fill": label.colour,
                "font-family": "Helvetica, Arial, sans-serif",
                "font-size": f"{FONT:g}",
                "font-weight": "bold" if label.bold else "normal",
                "text-anchor": label.anchor,
            },
        )
        text.text = label.text
    with replacing(path) as temporary:
        ElementTree.ElementTree(root).write(temporary, encoding="utf-8", xml_declaration=True)


def write_png(page: Drawing, path: Path, scale: float = 2.0) -> None:
    """Write the drawing as PNG with ``scale`` pixels per pixel of the drawing.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import PathPatch, Rectangle
    from matplotlib.path import Path as Outline

    figure = Figure(figsize=(page.width / 72, page.height / 72), dpi=72 * scale, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, page.width)
    axes.set_ylim(page.height, 0)
    axes.axis("off")
    bezier = [Outline.MOVETO, Outline.CURVE4, Outline.CURVE4, Outline.CURVE4]
    for curve in page.curves:
        away = curve.x - curve.bulge
        points = [(curve.x, curve.start), (away, curve.start), (away, curve.stop), (curve.x, curve.stop)]
        axes.add_patch(PathPatch(Outline(points, bezier), fill=False, edgecolor=curve.colour, linewidth=1.3))
    for box in page.boxes:
        axes.add_patch(Rectangle((box.x, box.y), box.width, box.height, facecolor=box.colour))
    sides = {"start": "left", "middle": "center", "end": "right"}
    for label in page.labels:
        axes.text(
            label.x,
            label.y,
            label.text,
            color=label.colour,
            fontsize=FONT * 0.9,
            fontweight="bold" if label.bold else "normal",
            ha=sides[label.anchor],
            va="center",
        )
    with replacing(path) as temporary:
        figure.savefig(temporary)
