"""The cost of a whole training, dense and pruned with ``shrink``: wall time, memory and Dice.

``python -m benchmarks.training --data DIR --model unet --seeds 3 --steps 1000`` trains every seed twice with
equal steps and threads: dense with ``torch.optim.AdamW(fused=True)``, and shrinking to ``keep`` of the MACs
by ``finish`` of the steps. The two take turns, some steps each, in one process, so that a slower spell of the
machine hits both. The time covers everything from the construction of the model to the last score: tracing,
events, cutting, loading of images. Peak memory of each is measured in a separate process
(``python -m benchmarks.peak_memory``).

Writes ``benchmarks/results/training-NAME.json`` and ``.txt``.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

from benchmarks.environment import environment
from sparsekern.recipes.checkpoint import save_checkpoint
from sparsekern.recipes.data import Split
from sparsekern.recipes.load import load_data
from sparsekern.recipes.metrics import SegmentationLoss
from sparsekern.recipes.settings import Settings
from sparsekern.recipes.train import Trainer

RESULTS = Path(__file__).parent / "results"

# 7.76 and 3.2 million parameters.
WIDTHS = {"unet": 32, "mobilenetv3": 1}
KEEP = {"unet": 0.2, "mobilenetv3": 0.4}


def main(
    data: Annotated[Path, typer.Option(help="folder with {train,test}/{images,masks}")],
    model: Annotated[str, typer.Option(help="unet, mobilenetv3")] = "unet",
    name: Annotated[str | None, typer.Option(help="of the files in benchmarks/results")] = None,
    width: float | None = None,
    keep: float | None = None,
    begin: float = 0.1,
    finish: float = 0.4,
    events: int = 10,
    round_to: Annotated[int, typer.Option(help="0 for auto")] = 0,
    steps: int = 1000,
    batch: int = 8,
    crop: int = 128,
    lr: float = 1e-3,
    seeds: int = 3,
    turn: Annotated[int, typer.Option(help="steps that a training makes before the other one does")] = 10,
    threads: int = 0,
) -> None:
    """Train every seed dense and shrinking, in turns, and report the ratio."""
    if threads:
        torch.set_num_threads(threads)
    settings = Settings(
        model=model,
        width=width or WIDTHS[model],
        keep=keep or KEEP[model],
        round_to=round_to or None,
        warmup=begin,
        finish=finish,
        events=events,
        shrink=True,
        steps=steps,
        batch=batch,
        crop=crop,
        lr=lr,
        evaluations=1,
    )
    images = load_data(data, replace(settings, validation=0))
    train, test = images.train, images.test
    runs = []
    for seed in range(seeds):
        runs.append(compare(replace(settings, seed=seed), train, test, data, turn))
        typer.echo(_line(runs[-1]))
    record = {"settings": settings.to_json(), "turn": turn, "environment": environment(), "runs": runs}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"training-{name or model}"
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    report = _report(record)
    path.with_suffix(".txt").write_text(report)
    typer.echo(report)


@dataclass
class Timed:
    """A training and its wall time so far."""

    trainer: Trainer
    seconds: float

    @classmethod
    def make(cls, settings: Settings, train: Split, test: Split) -> Timed:
        begin = perf_counter()
        trainer = Trainer(settings, train, test)
        return cls(trainer, perf_counter() - begin)

    def run(self, stop: int) -> None:
        begin = perf_counter()
        self.trainer.run(stop)
        self.seconds += perf_counter() - begin

    def figures(self, folder: Path, data: Path) -> dict[str, Any]:
        history, steps = self.trainer.history, self.trainer.settings.steps
        path = folder / "checkpoint.pt"
        save_checkpoint(path, self.trainer.state_dict())
        memory = _memory(path, data)
        return {
            "seconds": self.seconds,
            "step_seconds": sum(history.seconds),
            "last_step_seconds": statistics.median(history.seconds[-max(1, steps // 4) :]),
            "dice": history.scores[-1][1],
            "parameters": sum(p.numel() for p in self.trainer.model.parameters()),
            "peak_bytes": memory["peak"],
            "memory": memory,
        }


def compare(settings: Settings, train: Split, test: Split, data: Path, turn: int) -> dict[str, Any]:
    """Both trainings of one seed."""
    dense = Timed.make(replace(settings, keep=None, shrink=False), train, test)
    shrunk = Timed.make(settings, train, test)
    pruner = shrunk.trainer.pruner
    assert pruner is not None
    # Outside of the training's time.
    even = pruner.forecast().stages
    forecast = pruner.forecast(measure=training_loss(shrunk.trainer))
    for number, stop in enumerate(range(turn, settings.steps + turn, turn)):
        # The order alternates, so that neither always finds the caches of the other.
        for timed in (dense, shrunk) if number % 2 else (shrunk, dense):
            timed.run(stop)
    metrics = pruner.metrics()
    with tempfile.TemporaryDirectory() as folder:
        figures = {
            kind: timed.figures(Path(folder), data) for kind, timed in (("dense", dense), ("shrunk", shrunk))
        }
    cost, graph = shrunk.trainer.history.cost, pruner.graph
    return {
        "seed": settings.seed,
        **figures,
        "macs_share": metrics["macs_share"],
        "params_share": metrics["params_share"],
        "activations_share": graph.cost(np.ones(graph.num_channels, bool)).activations
        / even[0].activation_bytes,
        "even_activations_share": even[-1].activation_bytes / even[0].activation_bytes,
        "training_macs_share": statistics.fmean(share for _, share, _ in cost),
        "met_at_step": next(step for step, share, _ in cost if share <= settings.keep),
        "forecast_macs_share": forecast.macs_share,
        "forecast_time_share": forecast.time_share,
        "forecast": str(forecast).splitlines(),
        "kept": [kept for kept, _ in pruner.widths().values()],
    }


def training_loss(trainer: Trainer) -> Callable[[nn.Module], Tensor]:
    """Losses of a model on successive batches of the training, including the making of each batch."""
    criterion, numbers = SegmentationLoss(), itertools.count()

    def loss(model: nn.Module) -> Tensor:
        x, y = trainer.batches(next(numbers))
        return criterion(model(x.to(memory_format=torch.channels_last)), y)

    return loss


def _memory(checkpoint: Path, data: Path) -> dict[str, int]:
    """The output of :mod:`benchmarks.peak_memory`."""
    command = [sys.executable, "-m", "benchmarks.peak_memory", "--data", str(data)]
    command += ["--checkpoint", str(checkpoint), "--threads", str(torch.get_num_threads())]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    memory: dict[str, int] = json.loads(finished.stdout)
    return memory


def _ratio(run: dict[str, Any], key: str) -> float:
    return float(run["shrunk"][key] / run["dense"][key])


COLUMNS = (
    "seed",
    "dense s",
    "shrunk s",
    "time",
    "forecast",
    "last step",
    "peak memory",
    "Dice dense",
    "shrunk",
    "MACs",
    "parameters",
    "budget met at step",
)


def _row(run: dict[str, Any]) -> list[str]:
    return [
        str(run["seed"]),
        f"{run['dense']['seconds']:.0f}",
        f"{run['shrunk']['seconds']:.0f}",
        f"{_ratio(run, 'seconds'):.3f}",
        f"{run['forecast_time_share']:.3f}",
        f"{_ratio(run, 'last_step_seconds'):.3f}",
        f"{_ratio(run, 'peak_bytes'):.3f}",
        f"{run['dense']['dice']:.4f}",
        f"{run['shrunk']['dice']:.4f}",
        f"{run['macs_share']:.3f}",
        f"{run['params_share']:.3f}",
        f"{run['met_at_step']:.0f}",
    ]


def _line(run: dict[str, Any]) -> str:
    return "  ".join(f"{name} {cell}" for name, cell in zip(COLUMNS, _row(run), strict=True))


def _memory_lines(run: dict[str, Any]) -> list[str]:
    """The parts of the peak memory of a step, dense and shrunk."""
    lines = [
        "memory of the first seed in MiB: weights, gradients, optimizer's state and the Pruner's arrays;",
        "what a forward pass keeps for the backward pass; the rest: gradients of activations, scratch memory",
        "of the convolutions, the allocator's",
    ]
    for kind in ("dense", "shrunk"):
        memory = run[kind]["memory"]
        held = sum(memory[name] for name in ("weights", "gradients", "state", "pruner"))
        parts = (held, memory["saved"], memory["peak"] - held - memory["saved"])
        cells = [f"{size / 2**20:.0f}" for size in (*parts, memory["peak"])]
        lines.append(f"{kind:>6}: {cells[0]} + {cells[1]} + {cells[2]} = {cells[3]}")
    lines.append(
        f"activations of a forward pass: {run['activations_share']:.3f} of dense; an even cut of all layers "
        f"to the same MACs would keep {run['even_activations_share']:.3f}"
    )
    return lines


def _report(record: dict[str, Any]) -> str:
    runs, settings = record["runs"], record["settings"]
    rows = [list(COLUMNS), *(_row(run) for run in runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    mean = {key: statistics.fmean(_ratio(run, key) for run in runs) for key in ("seconds", "peak_bytes")}
    loss = statistics.fmean(run["shrunk"]["dice"] - run["dense"]["dice"] for run in runs)
    size = f"{runs[0]['dense']['parameters']:,} parameters"
    lines = [
        f"{settings['model']} width {settings['width']:g} ({size}), keep={settings['keep']} of MACs by "
        f"{settings['finish']:.0%} of {settings['steps']} steps, {settings['events']} events, batch "
        f"{settings['batch']} of {settings['crop']}x{settings['crop']}, turns of {record['turn']} steps",
        ", ".join(f"{key} {value}" for key, value in record["environment"].items()),
        "",
        *("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows),
        "",
        f"mean: time {mean['seconds']:.3f} of dense, peak memory {mean['peak_bytes']:.3f}, Dice {loss:+.4f}",
        "",
        *_memory_lines(runs[0]),
        "",
        "forecast of the first seed:",
        *runs[0]["forecast"],
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
