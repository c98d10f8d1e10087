"""Transformers and networks beside them: traced, half of all channels removed, compared.

``python -m benchmarks.transformers`` takes every network of ``benchmarks.transformers_networks`` with random
weights in float64. Each runs in a process of its own, with a limit of processor time, so that other work on
the machine changes no result. A model is traced twice: as it is made, and after a first run of its forward.
The two traces have to find the same channels. Half of every group goes at random. The network with these
channels masked and the compact one have to give the same outputs, in evaluation mode and in training mode
where the forward has one (every probability of dropout is 0, so that both runs do the same).

The norms and attentions of transformers cast to float32 and back whatever the model's dtype is. float32 would
round both outputs differently, so these casts leave float64 tensors as they are here; see
``without_float32``.

``exact``: every difference is below 1e-12 of the largest output. ``channels`` counts those that can go,
``share`` is their part of all rows of weights with more than one row, and ``left`` are the parameters that
are left. Seconds are those of the first trace on one thread.
"""

from __future__ import annotations

import copy
import io
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from benchmarks.environment import environment
from benchmarks.exactness import mask
from benchmarks.float64 import without_float32
from benchmarks.limited import limited, preload
from benchmarks.networks import randomise
from benchmarks.saved import save
from benchmarks.transformers_networks import NETWORKS
from sparsekern import compact, trace
from sparsekern.compact import make_plan
from sparsekern.compact.verify import leaves
from sparsekern.graph import ChannelGraph

BOUND = 1e-12
preload(["benchmarks.transformers_networks", "sparsekern", "timm"])
NOTE = "Casts from float64 to float32 inside the forwards of transformers are left out."


@dataclass
class Report:
    """The results of one network.

    Attributes:
        network: Its name in ``NETWORKS``.
        seconds: Processor time of the first trace.
        channels: Channels found, before and after a first run of the model.
        share: The rows of weights that are channels, as a share of all rows.
        left: Parameters left after half of all channels are removed, as a share.
        differences: Between masked and compact outputs, by state of the model and mode.
        moved: The change of the output by the masks, in the same measure.
        reasons: The most frequent reasons why tensors stay.
        untraced: Why training mode was not traced; empty if it was.
        error: The error, if there is one.
    """

    network: str
    seconds: float = 0.0
    channels: dict[str, int] = field(default_factory=dict)
    share: float = 0.0
    left: float = 1.0
    differences: dict[str, float] = field(default_factory=dict)
    moved: float = 0.0
    reasons: list[str] = field(default_factory=list)
    untraced: str = ""
    error: str = ""

    @property
    def outcome(self) -> str:
        if self.error:
            return "error"
        if max(self.differences.values()) >= BOUND:
            return "WRONG"
        if len(set(self.channels.values())) > 1:
            return "differs after a run"
        return "exact" if all(self.channels.values()) else "whole"


def without_chance(model: nn.Module) -> None:
    """Set every probability of dropout and of skipped layers to 0, also in configurations."""
    for thing in [*model.modules(), *(m.config for m in model.modules() if hasattr(m, "config"))]:
        for name, value in list(vars(thing).items()):
            if isinstance(value, float) and (name == "p" or "drop" in name):
                setattr(thing, name, 0.0)


def half(graph: ChannelGraph) -> np.ndarray:
    """Keep a random half of every group, rounded up; bool [C]."""
    generator = np.random.default_rng(0)
    kept = np.ones(graph.num_channels, bool)
    for group in graph.groups:
        kept[generator.permutation(group.channels)[: len(group.channels) // 2]] = False
    return kept


def share_of_rows(model: nn.Module, graph: ChannelGraph) -> float:
    """The rows of weights that are channels, as a share of all rows of weights."""
    found = total = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        slots = graph.tensors.get(name)
        total += parameter.shape[slots.row_dim or 0] if slots else parameter.shape[0]
        if slots is not None and slots.row_dim is not None:
            channels = slots.channels[slots.row_dim]
            found += 0 if channels is None else int((channels >= 0).sum())
    return found / total


@torch.no_grad()
def outputs(model: nn.Module, inputs: Mapping[str, Any], training: bool) -> list[Tensor]:
    torch.manual_seed(0)
    np.random.seed(0)
    # Training mode changes running statistics; the next comparison must not see that.
    made = (copy.deepcopy(model) if training else model).train(training)(**inputs)
    return [leaf for _, leaf in leaves(made) if isinstance(leaf, Tensor)]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference of an output over the largest value in it; inf if the shapes differ."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or not bool(a.isfinite().all() or (a == b).all()):
            return float("inf")
        if a.numel():
            apart = torch.where(a == b, 0.0, (a - b).abs())
            worst = max(worst, float(apart.max() / a.abs().nan_to_num(posinf=0.0).max().clamp_min(1e-300)))
    return worst


def runs(model: nn.Module, inputs: Mapping[str, Any], training: bool) -> bool:
    """Whether the mode exists: some forwards need labels in training."""
    try:
        outputs(copy.deepcopy(model), inputs, training)
    except Exception:
        if not training:
            raise
        return False
    return True


def examine(name: str) -> Report:
    """Measure everything about one network."""
    report = Report(name)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    try:
        model, inputs = NETWORKS[name]()
        model = model.double().eval()
        without_float32()
        randomise(model)
        without_chance(model)
        inputs = {
            k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
        }
        _measure(report, model, inputs)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        report.error = f"{type(error).__name__}: {lines[0]}"
    return report


def _measure(report: Report, model: nn.Module, inputs: dict[str, Any]) -> None:
    for state in ("made", "run"):
        if state == "run":
            outputs(model, inputs, False)
        start = time.process_time()
        graph = trace(model, (), example_kwargs=inputs)
        report.seconds = report.seconds or time.process_time() - start
        report.channels[state] = graph.num_channels
        report.untraced = graph.untraced
        report.reasons = [
            f"{why}: {count}" for why, count in Counter(why for _, why in graph.frozen).most_common(4)
        ]
        kept = half(graph)
        masked = copy.deepcopy(model)
        mask(masked, graph, kept)
        small = compact(masked, make_plan(graph, kept))
        whole = sum(p.numel() for p in model.parameters())
        report.left = sum(p.numel() for p in small.parameters()) / whole
        report.share = share_of_rows(model, graph)
        for training in (False, True):
            if runs(masked, inputs, training):
                key = f"{state}, {'training' if training else 'evaluation'}"
                ours, theirs = (outputs(m, inputs, training) for m in (masked, small))
                report.differences[key] = difference(ours, theirs)
        report.moved = max(
            report.moved, difference(outputs(model, inputs, False), outputs(masked, inputs, False))
        )


def isolated(name: str, seconds: int) -> Report:
    """Examine a network in a process of its own, for at most so many seconds of processor time."""
    try:
        return limited(examine, name, seconds=seconds)
    except (TimeoutError, RuntimeError) as error:
        return Report(name, error=str(error))


def tabulate(reports: list[Report]) -> Table:
    table = Table("network", "trace s", "channels", "share", "left", "moved", "eval", "train", "outcome")
    for r in reports:
        worst = [
            max((d for key, d in r.differences.items() if key.endswith(mode)), default=float("nan"))
            for mode in ("evaluation", "training")
        ]
        figures = (f"{r.share:.2f}", f"{r.left:.2f}", f"{r.moved:.0e}", *(f"{w:.0e}" for w in worst))
        counts = "/".join(str(n) for n in dict.fromkeys(r.channels.values()))
        table.add_row(r.network, f"{r.seconds:.1f}", counts, *figures, r.outcome)
    return table


def show(console: Console, reports: list[Report]) -> None:
    """Print the table, the main reasons of what stays, and the machine."""
    console.print(NOTE)
    console.print(tabulate(reports))
    for r in reports:
        console.print(f"{r.network}: {r.error or '; '.join(r.reasons)}", highlight=False)
        if r.untraced:
            console.print(f"  training mode: {r.untraced}", highlight=False)
    console.print(Counter(r.outcome for r in reports), highlight=False)
    console.print(environment())


def main(
    network: Annotated[list[str] | None, typer.Argument(help="Names; all by default.")] = None,
    seconds: Annotated[int, typer.Option(help="Limit of processor time for each network.", min=1)] = 120,
    name: Annotated[str, typer.Option(help="Name of the files for all networks.")] = "transformers",
) -> None:
    unknown = sorted(set(network or ()) - NETWORKS.keys())
    if unknown:
        raise typer.BadParameter(f"got {unknown}, expected some of {sorted(NETWORKS)}")
    reports: list[Report] = []
    for one in track(network or list(NETWORKS), console=Console(stderr=True)):
        reports.append(isolated(one, seconds))
        if not network:
            # The results so far are kept if the run is stopped.
            console = Console(width=150, record=True, file=io.StringIO())
            show(console, reports)
            save(name, console, [asdict(r) for r in reports])
    show(Console(width=150), reports)
    if any(r.outcome == "WRONG" for r in reports):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
