"""Budgets of time in other runtimes: ``python -m benchmarks.runtime_budget``.

Each network is pruned to a share of its latency in a runtime, ``of="latency", runtime=...``. Dense and
compact networks then take turns in that runtime. The output has the budget, the predicted and the measured
share, and the load of the machine, since other processes lengthen wall times: with one thread, times are CPU
times of the process. Weights are random, since times depend on widths alone; see
:mod:`benchmarks.latency_budget`.
"""

from __future__ import annotations

import os
import statistics
from dataclasses import replace
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment
from benchmarks.latency_budget import magnitudes, network
from benchmarks.saved import save
from sparsekern import compact, latency, trace
from sparsekern.compact import make_plan
from sparsekern.latency.timing import Stopwatch
from sparsekern.prune.decide.allocate import Global, Problem
from sparsekern.runtimes import Runtime, check_runtime, version
from sparsekern.runtimes.prepare import prepare

CASES = ("unet-8m", "mobilenetv3-seg", "resnet50")


def measure(
    name: str, runtime: Runtime, size: int, keep: float, round_to: int, rounds: int
) -> dict[str, Any]:
    """All figures of one network in one runtime."""
    model, image = network(name, size)
    graph = trace(model, image)
    begin = perf_counter()
    times = latency.measure(model, graph, image, round_to=round_to, runtime=runtime)
    seconds = perf_counter() - begin
    everything = np.ones(graph.num_channels, bool)
    floors = np.ones(len(graph.groups), np.int64)
    saliency = magnitudes(model, graph)
    problem = Problem(graph, saliency, everything, 0.0, "latency", floors, round_to, pricing=times)
    kept = Global()(replace(problem, budget=keep * problem.cost(everything)))
    small = compact(model, make_plan(graph, kept)).eval()
    watch, threads = Stopwatch(torch.device("cpu"), runtime), torch.get_num_threads()
    with torch.no_grad():
        runs = [prepare(one, (image,), {}, runtime, threads) for one in (model, small)]
        pairs = [[watch.seconds(run) for run in runs] for _ in range(rounds)]
    return {
        "network": name,
        "runtime": runtime,
        "version": version(runtime),
        "size": size,
        "keep": keep,
        "dense_ms": 1e3 * statistics.median(dense for dense, _ in pairs),
        "predicted": times.cost(kept) / times.cost(everything),
        "measured": statistics.median(small / dense for dense, small in pairs),
        "macs": graph.cost(kept).macs / graph.cost(everything).macs,
        "table_seconds": seconds,
        "load": os.getloadavg()[0],
    }


def main(
    keep: float = 0.4,
    size: int = 256,
    round_to: int = 16,
    rounds: int = 61,
    runtime: Annotated[list[str], typer.Option(help="may be repeated")] = ["onnxruntime"],  # noqa: B006
    only: Annotated[list[str] | None, typer.Option(help="of the networks, may be repeated")] = None,
    output: Annotated[str, typer.Option(help="name of the files in benchmarks/results; none to print")] = "",
) -> None:
    """Prune the networks to a share of their latency in a runtime and measure it there."""
    torch.set_num_threads(1)
    table = Table(
        "network", "runtime", "dense ms", "budget", "predicted", "measured", "off budget", "MACs", "load"
    )
    figures = []
    for where in map(check_runtime, runtime):
        for name in only or CASES:
            figure = measure(name, where, size, keep, round_to, rounds)
            figures.append(figure)
            table.add_row(
                name,
                f"{where} {figure['version']}",
                f"{figure['dense_ms']:.1f}",
                *(f"{figure[key]:.1%}" for key in ("keep", "predicted", "measured")),
                f"{figure['measured'] / keep - 1:+.1%}",
                f"{figure['macs']:.1%}",
                f"{figure['load']:.1f}",
            )
    settings = {"keep": keep, "size": size, "round_to": round_to, "rounds": rounds} | environment()
    console = Console(width=120, record=True)
    console.print(table)
    console.print(settings)
    if output:
        save(output, console, {"settings": settings, "networks": figures})


if __name__ == "__main__":
    typer.run(main)
