"""The effect of the choice of channels: one pruned training with several criteria and with random choice.

    python -m benchmarks.controls --data DIR

It trains a UNet on a folder of images and masks, as ``benchmarks.segmentation`` does, with the same budget,
steps and seeds for every pair of a criterion and an allocator. ``random`` ranks channels at random;
``shuffled`` keeps the layer widths of ``joint`` and chooses the channels at random; ``uniform`` cuts every
layer by the same share. It writes a table and the figures to ``benchmarks/results/``.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment
from benchmarks.saved import save
from sparsekern.recipes.load import load_data
from sparsekern.recipes.run import execute
from sparsekern.recipes.settings import Settings

PAIRS = (
    ("joint", "global"),
    ("shuffled", "global"),
    ("taylor", "global"),
    ("magnitude", "global"),
    ("random", "global"),
    ("random", "uniform"),
)


def main(
    data: Annotated[Path, typer.Option(help="Folder with {train,test}/{images,masks}.")],
    name: Annotated[str, typer.Option(help="Of the files in benchmarks/results.")] = "controls-unet",
    keep: Annotated[float, typer.Option(help="Share of the MACs.")] = 0.1,
    steps: int = 500,
    seeds: int = 3,
) -> None:
    torch.set_num_threads(1)
    settings = Settings(
        model="unet", width=16, keep=keep, steps=steps, batch=8, crop=128, lr=1e-3, evaluations=1
    )
    images = load_data(data, replace(settings, validation=0))
    # For the curves only; no choice depends on them.
    images = replace(images, val=images.test)
    runs: list[dict[str, Any]] = []
    for seed in range(seeds):
        for select, allocate in PAIRS:
            chosen = replace(settings, seed=seed, select=select, allocate=allocate)
            with tempfile.TemporaryDirectory() as out:
                result = execute(chosen, images, Path(out), arguments={})
            assert result is not None
            runs.append({"select": select, "allocate": allocate, "seed": seed} | result.figures)
            Console(stderr=True).print(
                f"{select}, {allocate}, seed {seed}: Dice {result.figures['dice']:.4f}"
            )
    record = {"settings": settings.to_json(), "environment": environment(), "runs": runs}
    console = Console(record=True, width=100)
    console.print(_table(runs))
    console.print(environment(), soft_wrap=True)
    save(name, console, record)


def _table(runs: list[dict[str, Any]]) -> Table:
    seeds = sorted({run["seed"] for run in runs})
    table = Table(
        "select", "allocate", "mean Dice", *(f"seed {seed}" for seed in seeds), "parameters", "MACs"
    )
    for select, allocate in PAIRS:
        own = [run for run in runs if (run["select"], run["allocate"]) == (select, allocate)]
        dice = [run["dice"] for run in own]
        shares = [
            statistics.fmean(run[what] / run["full"][what] for run in own) for what in ("parameters", "macs")
        ]
        figures = [f"{value:.4f}" for value in (statistics.fmean(dice), *dice)]
        table.add_row(select, allocate, *figures, *(f"{share:.1%}" for share in shares))
    return table


if __name__ == "__main__":
    typer.run(main)
