"""Budgets of time against budgets of multiply-adds: ``python -m benchmarks.latency_budget``.

Each network is pruned to a share of its own latency, and to that share of the multiply-adds at which the
table of latencies gives the same time. Dense and compact networks then take turns. The output has the medians
of the ratios to the dense network's time in the same round, and the share of the saliency that is left. The
weights are random, since times depend on widths alone; a log-normal factor scales each filter, so that
magnitudes (the saliency) spread as in a trained network.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.environment import environment, kept_memory
from benchmarks.networks import NETWORKS
from benchmarks.saved import save
from sparsekern import compact, criteria, latency, trace
from sparsekern.compact import make_plan
from sparsekern.graph import ChannelGraph
from sparsekern.prune.decide.allocate import Global, Problem
from sparsekern.prune.state.statistics import weight_statistics

CASES = ("mobilenetv3-seg", "unet-8m")
SPREAD = 0.5
# No lower bound on widths, because it would differ between the two budgets.
ALLOCATE = Global(balance=0.0)


def network(name: str, size: int) -> tuple[nn.Module, Tensor]:
    """The network ``name`` with filters of unequal norms, channels last, and an image for it."""
    torch.manual_seed(0)
    model = NETWORKS[name]().to(memory_format=torch.channels_last).eval()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            dim = 1 if module.transposed else 0
            shape = [1] * 4
            shape[dim] = module.weight.shape[dim]
            with torch.no_grad():
                module.weight.mul_(torch.exp(SPREAD * torch.randn(shape)))
    return model, torch.randn(1, 3, size, size).contiguous(memory_format=torch.channels_last)


def magnitudes(model: nn.Module, graph: ChannelGraph) -> np.ndarray:
    """The norm of every channel's filters over the mean of its group, so that all layers count alike."""
    found = weight_statistics(model, graph)
    saliency = criteria.Magnitude()(found)
    return saliency / found.per_group(lambda live: float(live.mean()), saliency)


def same_time(problem: Problem, times: latency.LatencyModel, nanoseconds: float) -> np.ndarray:
    """The channels kept by the largest budget of multiply-adds whose network takes at most the given time."""
    whole = problem.cost(problem.live)
    low, high = 0.0, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        kept = ALLOCATE(replace(problem, budget=middle * whole))
        low, high = (middle, high) if times.cost(kept) <= nanoseconds else (low, middle)
    return ALLOCATE(replace(problem, budget=low * whole))


@torch.inference_mode()
def ratios(models: list[nn.Module], image: Tensor, rounds: int) -> tuple[float, list[float]]:
    """Median milliseconds of the first network, and each network's median ratio to it in the same round."""
    for model in models:
        model(image)
    times: list[list[float]] = []
    for _ in range(rounds):
        times.append([])
        for model in models:
            begin = perf_counter()
            model(image)
            times[-1].append(perf_counter() - begin)
    dense = statistics.median(row[0] for row in times)
    return 1e3 * dense, [statistics.median(row[i] / row[0] for row in times) for i in range(len(models))]


def measure(name: str, size: int, keep: float, round_to: int, rounds: int) -> dict[str, Any]:
    """All figures of one network."""
    model, image = network(name, size)
    graph = trace(model, image)
    times = latency.measure(model, graph, image, round_to=round_to)
    saliency = magnitudes(model, graph)
    everything = np.ones(graph.num_channels, bool)
    floors = np.ones(len(graph.groups), np.int64)
    problem = Problem(graph, saliency, everything, 0.0, "latency", floors, round_to, pricing=times)
    problem = replace(problem, budget=keep * problem.cost(everything))
    choices = {f"latency, round_to={round_to}": ALLOCATE(problem)}
    nanoseconds = times.cost(choices[f"latency, round_to={round_to}"])
    for multiple in (round_to, 1):
        macs = replace(problem, of="macs", pricing=None, round_to=multiple, whole=0)
        choices[f"macs, round_to={multiple}"] = same_time(macs, times, nanoseconds)
    small = [compact(model, make_plan(graph, kept)) for kept in choices.values()]
    dense, measured = ratios([model, *small], image, rounds)
    found: dict[str, Any] = {"network": name, "size": size, "keep": keep, "dense_ms": dense, "rows": []}
    for (of, kept), ratio in zip(choices.items(), measured[1:], strict=True):
        row = {
            "of": of,
            "predicted": times.cost(kept) / times.cost(everything),
            "measured": ratio,
            "saliency": float(saliency[kept].sum() / saliency.sum()),
            "macs": graph.cost(kept).macs / graph.cost(everything).macs,
            "params": graph.cost(kept).params / graph.cost(everything).params,
        }
        found["rows"].append(row)
    return found


def main(
    keep: float = 0.4,
    size: int = 256,
    round_to: int = 8,
    rounds: int = 61,
    output: Annotated[str, typer.Option(help="name of the files in benchmarks/results; none to print")] = "",
) -> None:
    """Prune the networks to a share of their latency and compare."""
    torch.set_num_threads(1)
    table = Table("network", "of", "predicted", "measured", "off budget", "saliency", "MACs", "params")
    figures = []
    for name in CASES:
        with kept_memory() as freed_memory:
            figure = measure(name, size, keep, round_to, rounds)
        figures.append(figure)
        for row in figure["rows"]:
            cells = [f"{row[key]:.1%}" for key in ("predicted", "measured")]
            cells.append(f"{row['measured'] / keep - 1:+.1%}")
            cells += [f"{row[key]:.1%}" for key in ("saliency", "macs", "params")]
            table.add_row(f"{name} ({figure['dense_ms']:.0f} ms)", row["of"], *cells)
    settings = {"keep": keep, "size": size, "round_to": round_to, "rounds": rounds}
    settings |= environment() | {"freed_memory": freed_memory}
    console = Console(width=120, record=True)
    console.print(table)
    console.print(settings)
    if output:
        save(output, console, {"settings": settings, "networks": figures})


if __name__ == "__main__":
    typer.run(main)
