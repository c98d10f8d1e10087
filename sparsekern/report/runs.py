"""Tables of a run for the terminal, and figures as files.

The colours are from the palette of Okabe and Ito, which is safe for all kinds of colour vision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from sparsekern.files.atomic import replacing

if TYPE_CHECKING:
    from sparsekern.recipes.run import Result

BLUE, ORANGE, SKY, GREY = "#0072B2", "#D55E00", "#56B4E9", "#9A9A9A"
RUN_COLOURS = (ORANGE, BLUE)  # the first and the second run of a comparison
MISSED, INVENTED = "#E69F00", "#56B4E9"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}


def count(value: float) -> str:
    """A number with three digits and a unit: 1.94 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{_digits(value / size)} {unit}"
    return f"{value:.3g}"


def _digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def milliseconds(seconds: float) -> str:
    """Seconds as text in milliseconds."""
    return f"{_digits(1e3 * seconds)} ms"


# Name of the row, key of the figure, text of a value, text that compares the second value with the first.
Row = tuple[str, str, Callable[[float], str], Callable[[float, float], str]]


def _times(first: float, second: float) -> str:
    ratio = first / second if second else float("inf")
    return f"{ratio:.1f}x less" if ratio >= 1 else f"{1 / ratio:.2f}x more"


def _faster(first: float, second: float) -> str:
    if second <= 0 or 0.95 < first / second < 1.05:  # within the noise of two timings
        return "about equal"
    return f"{first / second:.1f}x faster" if first >= second else f"{second / first:.2f}x slower"


def _points(first: float, second: float) -> str:
    return f"{second - first:+.4f}"


SIZE_ROWS: tuple[Row, ...] = (
    ("parameters", "parameters", count, _times),
    ("MACs", "macs", count, _times),
    ("file size", "file_bytes", lambda value: count(value) + "B", _times),
    ("CPU latency", "latency", milliseconds, _faster),
)
TRAINING_ROWS: tuple[Row, ...] = (
    ("foreground Dice", "dice", "{:.4f}".format, _points),
    ("mIoU", "miou", "{:.4f}".format, _points),
    ("training step", "step_seconds", milliseconds, _faster),
    ("seconds in the optimizer", "optimizer_seconds", "{:.2f} s".format, _faster),
)


def comparison(title: str, columns: Mapping[str, Mapping[str, Any]]) -> Table:
    """A table of figures. With two columns, a third one compares the second column with the first.

    A cell without a figure stays empty, and a row without any figure is left out.

    Args:
        title: title of the table.
        columns: figures by column name.
    """
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    if len(columns) == 2:
        table.add_column("", justify="right", style="bold")
    for label, key, text, versus in SIZE_ROWS + TRAINING_ROWS:
        values = [figures.get(key) for figures in columns.values()]
        if all(value is None for value in values):
            continue
        cells = ["" if value is None else text(value) for value in values]
        if len(values) == 2:
            first, second = values
            cells.append("" if first is None or second is None else versus(first, second))
        table.add_row(label, *cells)
    return table


def run_table(result: Result) -> Table:
    """The figures of one run: its network, and the full-size network of a pruned run."""
    figures = result.figures
    _, _, height, width = figures["image"]
    title = f"{width}x{height} pixels an image, {figures['threads']} threads"
    if result.settings.keep is None:
        return comparison(title, {"dense": figures})
    return comparison(title, {"full size": figures["full"], "compact": figures})


def class_table(result: Result) -> Table:
    """Dice and IoU of each class on the test images; a dash for a class that does not occur there."""
    table = Table(title="classes of the test images", title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("pixels", "Dice", "IoU"):
        table.add_column(name, justify="right")
    total = max(1, sum(row["pixels"] for row in result.figures["classes"]))
    for row in result.figures["classes"]:
        shares = ["-" if row[key] is None else f"{row[key]:.4f}" for key in ("dice", "iou")]
        table.add_row(Text(row["name"]), f"{row['pixels'] / total:.2%}", *shares)
    return table


def curves(path: Path, runs: Mapping[str, Result]) -> None:
    """Draw loss, Dice and cost over the steps of one or two runs, and the channels kept per layer."""
    with matplotlib.rc_context(STYLE):
        pruned = [result for result in runs.values() if "kept" in result.figures]
        layers = len(pruned[-1].figures["kept"]) if pruned else 0
        size = (12.5 if pruned else 7.0, max(7.5, 1.6 + 0.27 * layers))
        figure = Figure(figsize=size)
        grid = figure.add_gridspec(3, 2 if pruned else 1, height_ratios=(3, 2, 2))
        loss, dice, cost = (figure.add_subplot(grid[row, 0]) for row in range(3))
        for (name, result), colour in zip(runs.items(), RUN_COLOURS[-len(runs) :], strict=True):
            _loss(loss, name, result, colour)
            _dice(dice, name, result, colour)
            _cost(cost, name, result, colour)
        for axes in (loss, dice, cost):
            axes.set_xlim(0, max(len(result.history.loss) for result in runs.values()))
        loss.legend()
        if dice.get_legend_handles_labels()[0]:
            dice.legend(loc="lower right")
        _decorate(loss, "Training loss", "cross entropy + 1 - Dice", log=True)
        _decorate(dice, "Foreground Dice of the validation images", "Dice")
        _decorate(cost, "Cost over time: MACs of the channels not masked", "% of dense")
        low, high = dice.get_ylim()
        dice.set_ylim(max(0.0, low), min(1.0, max(high, low + 0.1)))
        cost.set_xlabel("optimizer step")
        cost.set_ylim(0, 105)
        if pruned:
            _widths(figure.add_subplot(grid[:, 1]), pruned[-1])
        with replacing(path) as temporary:
            figure.savefig(temporary)


def _decorate(axes: Axes, title: str, label: str, log: bool = False) -> None:
    axes.set_title(title)
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())


def _loss(axes: Axes, name: str, result: Result, colour: str) -> None:
    loss = np.asarray(result.history.loss)
    steps = np.arange(1, len(loss) + 1)
    axes.plot(steps, loss, color=colour, alpha=0.2, linewidth=0.8)
    axes.plot(steps, _smooth(loss), color=colour, linewidth=1.8, label=name)


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Moving average over a twentieth of all steps, over fewer steps at both ends."""
    reach = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _dice(axes: Axes, name: str, result: Result, colour: str) -> None:
    if not result.history.scores:
        return
    step, dice, _ = np.asarray(result.history.scores).T
    label = f"{name}: {dice[-1]:.4f} at the end"
    axes.plot(step, dice, color=colour, marker="o", markersize=5, label=label, clip_on=False)


def _cost(axes: Axes, name: str, result: Result, colour: str) -> None:
    steps = len(result.history.loss)
    history = result.history.cost or [[steps, 1.0, 1.0]]
    step, share = [0.0], [100.0]
    for at, macs, _ in history:
        step += [at, at]
        share += [share[-1], 100 * macs]
    axes.plot(step, share, color=colour, linewidth=2)
    axes.annotate(
        f"{share[-1]:.1f} %",
        (steps, share[-1]),
        xytext=(-4, 5 if share[-1] < 90 else -13),
        textcoords="offset points",
        ha="right",
        color=colour,
        fontweight="bold",
    )


def _widths(axes: Axes, result: Result) -> None:
    figures = result.figures
    position = np.arange(len(figures["kept"]))
    axes.barh(position, figures["channels"], color="#DDDDDD", label="of the full-size network")
    axes.barh(position, figures["kept"], color=BLUE, label="kept")
    reach = max(figures["channels"])
    for at, kept, channels in zip(position, figures["kept"], figures["channels"], strict=True):
        axes.text(channels + 0.01 * reach, float(at), f"{kept} of {channels}", va="center", fontsize=8.5)
    axes.set_yticks(position, figures["groups"])
    axes.invert_yaxis()
    axes.set_ylim(len(position) - 0.4, -0.6)
    axes.set_xlim(0, 1.17 * reach)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("channels")
    axes.set_title("Channels kept per layer")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2)


def predictions(
    path: Path,
    images: Sequence[NDArray[np.uint8]],
    truths: Sequence[NDArray[np.uint8]],
    found: Mapping[str, Sequence[NDArray[np.int64]]],
) -> None:
    """Draw a row for each image: input, truth, and the prediction of each network.

    Args:
        path: the PNG file.
        images: images, uint8 `[H, W, 3]` each.
        truths: true class indices, uint8 `[H, W]` each.
        found: predicted class indices `[H, W]` of each image, by name of the network.
    """
    with matplotlib.rc_context({**STYLE, "axes.titlelocation": "center"}):
        columns = 2 + len(found)
        figure = Figure(figsize=(2.6 * columns, 2.62 * len(images) + 0.7))
        axes = figure.subplots(len(images), columns, squeeze=False)
        for row, (image, truth) in enumerate(zip(images, truths, strict=True)):
            axes[row, 0].imshow(image)
            axes[row, 1].imshow(truth > 0, cmap="gray", vmin=0, vmax=1)
            for panel, masks in zip(axes[row, 2:], found.values(), strict=True):
                panel.imshow(_errors(truth > 0, masks[row] > 0))
                dice = _pair_dice(truth > 0, masks[row] > 0)
                panel.set_xlabel(f"Dice {dice:.3f}", labelpad=3)
        for panel, title in zip(axes[0], ("input", "truth", *found), strict=True):
            panel.set_title(title)
        for panel in axes.flat:
            panel.set_xticks([])
            panel.set_yticks([])
            panel.grid(visible=False)
            panel.spines[:].set_visible(False)
        handles = [
            Patch(facecolor="white", edgecolor=GREY, label="found"),
            Patch(facecolor=MISSED, label="missed"),
            Patch(facecolor=INVENTED, label="not there"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
        with replacing(path) as temporary:
            figure.savefig(temporary)


def _errors(truth: NDArray[np.bool_], found: NDArray[np.bool_]) -> NDArray[np.float64]:
    """RGB `[H, W, 3]`: white for foreground in both, black for neither, a colour for each kind of error."""
    picture = np.zeros((*truth.shape, 3))
    picture[truth & found] = 1.0
    picture[truth & ~found] = matplotlib.colors.to_rgb(MISSED)
    picture[~truth & found] = matplotlib.colors.to_rgb(INVENTED)
    return picture


def _pair_dice(truth: NDArray[np.bool_], found: NDArray[np.bool_]) -> float:
    total = int(truth.sum()) + int(found.sum())
    return 2 * int((truth & found).sum()) / total if total else 1.0
