"""Dense against pruned training on a folder of images and masks, over several seeds.

``python -m benchmarks.segmentation --data DIR --name unet --keep 0.1`` trains each seed twice with equal
steps, once dense with ``torch.optim.AdamW(fused=True)`` and once pruned, and writes a table, the figures and
the curves to ``benchmarks/results/``. Times are not reported: several of these may share a machine.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment
from sparsekern.recipes.load import load_data
from sparsekern.recipes.run import Result, execute
from sparsekern.recipes.settings import Settings

matplotlib.use("Agg")

RESULTS = Path(__file__).parent / "results"


def main(
    data: Annotated[Path, typer.Option(help="folder with {train,test}/{images,masks}")],
    name: Annotated[str, typer.Option(help="of the files in benchmarks/results")],
    model: str = "unet",
    width: float = 16,
    keep: float = 0.1,
    of: str = "macs",
    round_to: int = 1,
    select: str = "joint",
    allocate: str = "global",
    steps: int = 600,
    batch: int = 8,
    crop: int = 128,
    lr: float = 1e-3,
    seeds: int = 3,
    threads: int = 0,
) -> None:
    """Train every seed dense and pruned, one after the other, and report the difference."""
    if threads:
        torch.set_num_threads(threads)
    settings = Settings(
        model=model,
        width=width,
        keep=keep,
        of=of,
        round_to=round_to,
        select=select,
        allocate=allocate,
        steps=steps,
        batch=batch,
        crop=crop,
        lr=lr,
        evaluations=12,
    )
    images = load_data(data, replace(settings, validation=0))
    # For the curves only; no choice depends on them.
    images = replace(images, val=images.test)
    runs: list[dict[str, Any]] = []
    curves: list[tuple[str, Result]] = []
    for seed in range(seeds):
        for kind, share in (("dense", None), ("pruned", keep)):
            with tempfile.TemporaryDirectory() as out:
                result = execute(replace(settings, seed=seed, keep=share), images, Path(out), arguments={})
            assert result is not None
            runs.append({"kind": kind, "seed": seed} | result.figures)
            curves.append((kind, result))
            Console().print(f"{kind} seed {seed}: Dice {result.figures['dice']:.4f}")
    record = {"settings": settings.to_json(), "environment": environment(), "runs": runs}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(_report(name, record))
    _draw(curves, RESULTS / f"{name}.png")
    Console().print(_table(runs))


def _row(run: dict[str, Any]) -> list[str]:
    full = run["full"]
    return [
        run["kind"],
        str(run["seed"]),
        f"{run['dice']:.4f}",
        f"{run['miou']:.4f}",
        f"{run['parameters']:,} ({run['parameters'] / full['parameters']:.1%})",
        f"{run['macs'] / full['macs']:.1%}",
    ]


COLUMNS = ["run", "seed", "Dice", "mIoU", "parameters", "MACs"]


def _table(runs: list[dict[str, Any]]) -> Table:
    table = Table(*COLUMNS)
    for run in runs:
        table.add_row(*_row(run))
    return table


def _report(name: str, record: dict[str, Any]) -> str:
    runs, settings = record["runs"], record["settings"]
    mean = {
        kind: statistics.fmean(run["dice"] for run in runs if run["kind"] == kind)
        for kind in ("dense", "pruned")
    }
    lines = [
        f"# {name}",
        "",
        f"`{settings['model']}` width {settings['width']:g}, keep={settings['keep']} of {settings['of']}, "
        f"round_to={settings['round_to']}, {settings['steps']} steps of {settings['batch']} crops of "
        f"{settings['crop']}², lr {settings['lr']}, select={settings['select']}, "
        f"allocate={settings['allocate']}.",
        "",
        ", ".join(f"{key} {value}" for key, value in record["environment"].items()),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
        *("| " + " | ".join(_row(run)) + " |" for run in runs),
        "",
        f"Mean Dice: dense {mean['dense']:.4f}, pruned {mean['pruned']:.4f}, "
        f"difference {mean['pruned'] - mean['dense']:+.4f}.",
        "",
        f"![curves]({name}.png)",
        "",
    ]
    return "\n".join(lines)


def _draw(curves: list[tuple[str, Result]], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, (loss, dice) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    colours = {"dense": "#555555", "pruned": "#0072B2"}
    labelled: set[str] = set()
    for kind, result in curves:
        label = kind if kind not in labelled else None
        labelled.add(kind)
        values = result.history.loss
        window = max(1, len(values) // 40)
        smooth = [statistics.fmean(values[max(0, i - window) : i + 1]) for i in range(len(values))]
        loss.plot(smooth, color=colours[kind], alpha=0.8, lw=1, label=label)
        steps, scores = zip(*((row[0], row[1]) for row in result.history.scores), strict=True)
        dice.plot(steps, scores, color=colours[kind], alpha=0.8, lw=1, marker="o", ms=3, label=label)
    loss.set(xlabel="step", ylabel="training loss", yscale="log")
    dice.set(xlabel="step", ylabel="foreground Dice, test split")
    for axes in (loss, dice):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    typer.run(main)
