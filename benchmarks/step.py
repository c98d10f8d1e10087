"""Our optimizer step with a Pruner's rows over torch's fused step without: ``python -m benchmarks.step``.

Both step the same list of parameters in turns, so that a slower spell of the machine hits both; printed are
medians of the rounds' times and of their ratios. The allocator keeps its memory (set at the start of the
process for both sides), since page faults would otherwise be half of what is measured.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import sparsekern
from benchmarks.environment import ALLOCATOR, environment, with_allocator
from benchmarks.networks import NETWORKS, example
from sparsekern.graph import trace
from sparsekern.prune.masking import Masks
from sparsekern.prune.statistics import ChannelRows

LISTS = ("resnet18", "mobilenet_v3_large", "unet-31m", "unet-2m")
SHORTEST = 0.02

Optimizer = torch.optim.Optimizer
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], Callable[..., Optimizer]]] = {
    "adamw": (
        lambda params: torch.optim.AdamW(params, fused=True),
        lambda params: sparsekern.optim.AdamW(params),
    ),
    "sgd": (
        lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, fused=True),
        lambda params: sparsekern.optim.SGD(params, lr=1e-3, momentum=0.9),
    ),
}


@dataclass(frozen=True)
class Case:
    """One comparison: a list of parameters, an optimizer, a dtype and the share of masked channels."""

    network: str
    optimizer: str = "adamw"
    dtype: torch.dtype = torch.float32
    masked: float = 0.0

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.network}-{self.optimizer}-{dtype}-{self.masked:.0%}"


CASES = [
    *(Case(network, "adamw", masked=masked) for masked in (0.0, 0.5, 0.8) for network in LISTS),
    *(Case(network, "sgd") for network in LISTS),
    *(Case(network, "adamw", torch.bfloat16) for network in LISTS),
]


@dataclass(frozen=True)
class Pair:
    """The two optimizers of a case, over copies of the same parameters and gradients."""

    theirs: Optimizer
    ours: Optimizer
    elements: int


def build(case: Case) -> Pair:
    """Set up a case: rows attached, a tenth of the live gates penalised, some declining, some masked."""
    torch.manual_seed(0)
    model = NETWORKS[case.network]()
    graph = trace(model, example(case.network))
    model.to(case.dtype)
    twin = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    for mine, other in zip(model.parameters(), twin, strict=True):
        mine.grad = torch.randn_like(mine) * 1e-3
        other.grad = mine.grad.clone()
    theirs, ours = (
        make(p) for make, p in zip(OPTIMIZERS[case.optimizer], (twin, model.parameters()), strict=True)
    )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rows = ChannelRows(model, graph, {id(p) for p in parameters.values()}, decay=0.99)
    sparsekern.optim.attach(ours, rows.table)
    masks = Masks(graph, rows, parameters, sparsekern.optim.state_tensors(ours))
    order = np.random.default_rng(0).permutation(graph.num_channels)
    chosen = np.zeros(graph.num_channels, bool)
    chosen[order[: round(case.masked * len(order))]] = True
    live = np.flatnonzero(~chosen)
    some = np.zeros_like(chosen)
    some[live[::10]] = True
    ours.step()
    theirs.step()
    masks.penalise(some, 0.01)
    masks.condemn(some, 1_000_000)
    masks.mask(chosen)
    return Pair(theirs, ours, sum(p.numel() for p in twin))


def measure(case: Case, rounds: int = 11) -> dict[str, Any]:
    """Medians over the rounds: seconds of either step, and the ratio of ours to torch's."""
    pair = build(case)
    steps = {"theirs": pair.theirs.step, "ours": pair.ours.step}
    repeats = {name: max(1, round(SHORTEST / _seconds(step, 1))) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(_seconds(step, repeats[name]))
    ratios = [ours / theirs for ours, theirs in zip(times["ours"], times["theirs"], strict=True)]
    seconds = statistics.median(times["ours"])
    return {
        "case": str(case),
        "torch_ms": statistics.median(times["theirs"]) * 1e3,
        "ours_ms": seconds * 1e3,
        "ratio": statistics.median(ratios),
        "elements": pair.elements,
    }


def _seconds(step: Callable[[], Any], repeats: int) -> float:
    begin = perf_counter()
    for _ in range(repeats):
        step()
    return (perf_counter() - begin) / repeats


def main(
    threads: int = 1,
    rounds: int = 11,
    only: Annotated[str, typer.Option(help="part of the names of the cases to run")] = "",
    output: Annotated[str, typer.Option(help="a JSON file for the figures")] = "",
) -> None:
    """Print the table of all cases."""
    torch.set_num_threads(threads)
    table = Table("case", "torch fused ms", "ours ms", "ratio")
    figures = []
    for case in CASES:
        if only not in str(case):
            continue
        figure = measure(case, rounds)
        figures.append(figure)
        cells = [f"{figure['torch_ms']:.3f}", f"{figure['ours_ms']:.3f}", f"{figure['ratio']:.3f}"]
        table.add_row(figure["case"], *cells)
    console = Console(width=110)
    console.print(table)
    console.print(environment() | {"rounds": rounds} | ALLOCATOR)
    if output:
        with open(output, "w") as file:
            json.dump({"environment": environment(), "rounds": rounds, "cases": figures}, file, indent=1)


if __name__ == "__main__":
    with_allocator("benchmarks.step", lambda: typer.run(main))
