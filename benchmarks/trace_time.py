"""Time of ``trace`` over the depth of the network: plain chains and residual networks of 50 to 5,000 layers.

``python -m benchmarks.trace_time`` prints the times and the slope of a straight line through them on two
logarithmic scales (1 is linear, 2 quadratic), and draws them. A layer is a convolution with batch norm and
relu. ``--network resnet50`` (or another name of torchvision, several times) measures that network alone, and
writes nothing. Times are seconds of the process on one thread; the time of torch.export is listed apart
from that of the analysis of its graphs.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.environment import environment
from sparsekern import trace

DEPTHS = (50, 100, 200, 500, 1000, 2000, 5000)
WIDTH = 8
RESULTS = Path(__file__).parent / "results"


def layer() -> nn.Module:
    return nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU())


class Residual(nn.Module):
    """Two layers and a shortcut around them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(layer(), layer())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def network(kind: str, depth: int) -> nn.Module:
    """A ``chain`` or ``residual`` network of about ``depth`` layers on images with ``WIDTH`` channels."""
    body = [layer() for _ in range(depth)] if kind == "chain" else [Residual() for _ in range(depth // 2)]
    return nn.Sequential(*body, nn.Conv2d(WIDTH, 2, 1))


@contextmanager
def exports_timed() -> Iterator[list[float]]:
    """Collects the seconds that calls of ``torch.export.export`` take."""
    seconds: list[float] = []
    export = torch.export.export

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return export(*args, **kwargs)
        finally:
            seconds.append(time.process_time() - start)

    torch.export.export = timed
    try:
        yield seconds
    finally:
        torch.export.export = export


def measure(kind: str, depth: int) -> tuple[float, float]:
    """Seconds of ``trace`` as a whole, and without torch.export."""
    model, x = network(kind, depth), torch.zeros(2, WIDTH, 8, 8)
    gc.collect()
    with exports_timed() as exports:
        start = time.process_time()
        graph = trace(model, x)
        seconds = time.process_time() - start
    assert len(graph.groups) == (depth if kind == "chain" else depth // 2)
    return seconds, seconds - sum(exports)


def measure_network(name: str) -> tuple[float, float, int]:
    """Seconds of ``trace`` of a network of torchvision as a whole and in torch.export, and its channels."""
    from torchvision import models

    model, x = models.get_model(name, weights=None), torch.zeros(2, 3, 224, 224)
    gc.collect()
    with exports_timed() as exports:
        start = time.process_time()
        graph = trace(model, x)
        seconds = time.process_time() - start
    return seconds, sum(exports), graph.num_channels


def slope(depths: list[int], seconds: list[float]) -> float:
    """The slope of the least-squares line through the logarithms."""
    return float(np.polyfit(np.log(depths), np.log(seconds), 1)[0])


def plot(times: dict[str, list[float]], depths: list[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, seconds in times.items():
        axes.loglog(depths, seconds, "o-", label=f"{name}: slope {slope(depths, seconds):.2f}")
    reference = times["chain"][0]
    axes.loglog(depths, [reference * d / depths[0] for d in depths], "k:", label="linear")
    axes.set(xlabel="layers (convolution, batch norm, relu)", ylabel="seconds", title="time of trace")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    most: Annotated[int, typer.Option(help="Deepest network.")] = DEPTHS[-1],
    results: Annotated[Path, typer.Option(help="Folder for trace_time.txt and .png.")] = RESULTS,
    network: Annotated[list[str] | None, typer.Option(help="Measure this network of torchvision.")] = None,
) -> None:
    torch.set_num_threads(1)
    depths = [depth for depth in DEPTHS if depth <= most]
    times: dict[str, list[float]] = {}
    measure("chain", depths[0])  # imports and caches of torch at first use must not count
    if network:
        table = Table("network", "seconds", "in torch.export", "channels")
        for name in network:
            seconds, exported, channels = measure_network(name)
            table.add_row(name, f"{seconds:.2f}", f"{exported:.2f}", f"{channels}")
        Console().print(table, environment())
        return
    for kind in ("chain", "residual"):
        pairs = [measure(kind, depth) for depth in depths]
        times[kind] = [whole for whole, _ in pairs]
        times[f"{kind}, without torch.export"] = [own for _, own in pairs]
    table = Table("network", *(f"{depth}" for depth in depths), "slope")
    for name, seconds in times.items():
        table.add_row(name, *(f"{s:.2f}" for s in seconds), f"{slope(depths, seconds):.2f}")
    with (results / "trace_time.txt").open("w") as file:
        for console in (Console(), Console(file=file, width=110)):
            console.print("seconds of trace by number of layers")
            console.print(table)
            console.print(environment())
    plot(times, depths, results / "trace_time.png")


if __name__ == "__main__":
    typer.run(main)
