"""Forty networks of four libraries: traced, half of all channels removed, compared, priced.

``python -m benchmarks.zoo`` takes every network of ``benchmarks.zoo_networks`` with random weights in
float64, with the statistics and affines of all norms at random, too. Of every group half of the channels
go, once at random and once those of the smallest norm. The network with these channels masked and the
compact one have to give the same outputs, in evaluation and in training mode (where every probability of
dropout and stochastic depth is set to 0, so that both runs do the same). The cost that the graph predicts
for the channels kept has to be that of the compact network: numbers in its parameters, and half the flops
that ``torch.utils.flop_counter`` counts in convolutions and matrix products (mm, addmm, bmm, baddbmm;
attention is run as two such products, since the counter does not know the fused kernel for CPUs).

``exact``: every difference is below 1e-12 of the largest output, and every cost is equal. ``whole``: exact,
but no channel can be removed. Seconds are of the process on one thread.
"""

from __future__ import annotations

import copy
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.environment import environment
from benchmarks.exactness import mask
from benchmarks.networks import randomise
from benchmarks.zoo_networks import NETWORKS
from sparsekern import compact, trace
from sparsekern.compact import make_plan
from sparsekern.compact.verify import leaves
from sparsekern.graph import ChannelGraph

BOUND = 1e-12
CHOICES = ("random", "magnitude")


@dataclass
class Report:
    """The results of one network.

    Attributes:
        differences: between masked and compact outputs, by choice of channels and mode.
        moved: the change of the output by the masks, in the same measure; it shows that the removed channels
            reached the output.
    """

    network: str
    trace_seconds: float = 0.0
    seconds: float = 0.0
    wall_seconds: float = 0.0
    groups: int = 0
    channels: int = 0
    params_left: float = 1.0
    macs_left: float = 1.0
    differences: dict[str, float] = field(default_factory=dict)
    moved: float = 0.0
    costs_equal: bool = False
    reasons: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def outcome(self) -> str:
        if self.error:
            return "crash"
        if not self.costs_equal or max(self.differences.values()) >= BOUND:
            return "WRONG"
        return "exact" if self.channels else "whole"


def without_chance(model: nn.Module) -> None:
    """Set every probability of dropout and stochastic depth to 0."""
    for module in model.modules():
        for name in ("p", "drop_prob", "drop_rate", "dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def choose(model: nn.Module, graph: ChannelGraph, choice: str) -> np.ndarray:
    """Choose half of every group, rounded up; bool ``[C]``."""
    scores = np.random.default_rng(0).random(graph.num_channels)
    if choice == "magnitude":
        scores = np.zeros(graph.num_channels)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, slots in graph.tensors.items():
            channels = None if slots.row_dim is None else slots.channels[slots.row_dim]
            if channels is not None and slots.row_dim is not None:
                rows = parameters[name].detach().transpose(0, slots.row_dim).reshape(len(channels), -1)
                sums = rows.square().sum(1).numpy()
                np.add.at(scores, channels[channels >= 0], sums[channels >= 0])
    kept = np.ones(graph.num_channels, bool)
    for group in graph.groups:
        order = group.channels[np.argsort(scores[group.channels], kind="stable")]
        kept[order[: len(order) // 2]] = False
    return kept


@torch.no_grad()
def difference(masked: nn.Module, small: nn.Module, inputs: Tensor, training: bool) -> float:
    """Largest difference of an output over the largest value in it."""
    runs = []
    for model in (masked, small):
        torch.manual_seed(0)
        # Training mode changes running statistics; the next comparison must not see that.
        runs.append(list(leaves((copy.deepcopy(model) if training else model).train(training)(inputs))))
    worst = 0.0
    for (where, a), (other, b) in zip(*runs, strict=True):
        if where != other or a.shape != b.shape or not bool(a.isfinite().all()):
            return float("inf")
        worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-300)))
    return worst


def macs(model: nn.Module, inputs: Tensor) -> int:
    """Half the flops that torch counts in evaluation mode."""
    counter = FlopCounterMode(display=False)
    # With gradients enabled, nn.MultiheadAttention does not take the fast path, which is not counted.
    with counter, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()(inputs)
    return int(counter.get_total_flops()) // 2


def examine(name: str) -> Report:
    """Measure everything about one network."""
    report = Report(name)
    torch.manual_seed(0)
    model = NETWORKS[name].make().double().eval()
    randomise(model)
    without_chance(model)
    inputs = torch.randn(2, *NETWORKS[name].shape, dtype=torch.float64)
    start, wall = time.process_time(), time.perf_counter()
    try:
        _measure(report, model, inputs)
    except Exception as error:
        report.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    report.seconds, report.wall_seconds = time.process_time() - start, time.perf_counter() - wall
    return report


def _measure(report: Report, model: nn.Module, inputs: Tensor) -> None:
    start = time.process_time()
    graph = trace(model, inputs)
    report.trace_seconds = time.process_time() - start
    report.groups, report.channels = len(graph.groups), graph.num_channels
    report.reasons = [
        f"{reason}: {count}" for reason, count in Counter(reason for _, reason in graph.frozen).most_common(3)
    ]
    dense = graph.cost(np.ones(graph.num_channels, bool))
    report.costs_equal = True
    for choice in CHOICES:
        kept = choose(model, graph, choice)
        masked = copy.deepcopy(model)
        mask(masked, graph, kept)
        small = compact(masked, make_plan(graph, kept))
        for training in (False, True):
            key = f"{choice}, {'training' if training else 'evaluation'}"
            report.differences[key] = difference(masked, small, inputs, training)
        report.moved = max(report.moved, difference(model, masked, inputs, False))
        cost = graph.cost(kept)
        parameters = sum(p.numel() for p in small.parameters())
        report.costs_equal &= cost.params == parameters and cost.macs == macs(small, inputs)
        report.params_left, report.macs_left = cost.params / dense.params, cost.macs / dense.macs


def tabulate(reports: list[Report]) -> Table:
    table = Table(
        "network",
        "trace s",
        "all s",
        "groups",
        "channels",
        "params left",
        "MACs left",
        "moved",
        "eval",
        "train",
        "costs",
        "outcome",
    )
    for r in reports:
        worst = [
            max((d for key, d in r.differences.items() if key.endswith(mode)), default=float("nan"))
            for mode in ("evaluation", "training")
        ]
        table.add_row(
            r.network,
            f"{r.trace_seconds:.1f}",
            f"{r.seconds:.1f}",
            f"{r.groups}",
            f"{r.channels}",
            f"{r.params_left:.2f}",
            f"{r.macs_left:.2f}",
            f"{r.moved:.2f}",
            *(f"{w:.0e}" for w in worst),
            "equal" if r.costs_equal else "DIFFER",
            r.outcome,
        )
    return table


def summary(reports: list[Report]) -> str:
    outcomes = Counter(report.outcome for report in reports)
    lighter = sum(report.outcome == "exact" and report.params_left <= 2 / 3 for report in reports)
    slowest = max(reports, key=lambda report: report.trace_seconds)
    longest = max(reports, key=lambda report: report.seconds)
    return (
        f"{', '.join(f'{count} {outcome}' for outcome, count in outcomes.items())} of {len(reports)}; "
        f"{lighter} lose a third of their parameters or more; "
        f"slowest trace: {slowest.network}, {slowest.trace_seconds:.1f} s; "
        f"longest in all: {longest.network}, {longest.seconds:.1f} s"
    )


def main(
    only: Annotated[list[str] | None, typer.Option(help="Networks to take; all by default.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
    text: Annotated[Path | None, typer.Option(help="File for the table.")] = None,
) -> None:
    wrong = sorted(set(only or ()) - set(NETWORKS))
    if wrong:
        raise typer.BadParameter(f"{wrong[0]!r}, expected some of {', '.join(NETWORKS)}", param_hint="--only")
    torch.set_num_threads(1)
    console = Console()
    console.width = max(console.width, 130)
    reports = []
    for name in only or NETWORKS:
        with console.status(name):
            reports.append(examine(name))
    consoles = [console, *([Console(file=text.open("w"), width=140)] if text else [])]
    for out in consoles:
        out.print(tabulate(reports))
        for report in reports:
            if report.error or report.params_left > 2 / 3:
                out.print(f"{report.network}: {report.error or '; '.join(report.reasons)}", highlight=False)
        out.print(summary(reports), highlight=False, soft_wrap=True)
        out.print(environment())
    if json_file:
        document: dict[str, Any] = {"environment": environment(), "networks": []}
        document["networks"] = [{**asdict(r), "outcome": r.outcome} for r in reports]
        json_file.write_text(json.dumps(document, indent=1) + "\n")
    if any(report.outcome in ("crash", "WRONG") for report in reports):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
