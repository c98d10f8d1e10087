"""Latency of the compact network over the dense one: ``python -m benchmarks.latency``.

A UNet is pruned in a short training on generated images, since the time of a forward pass depends on widths
and not on weights. Both networks then take turns on one image; the table shows medians.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment
from sparsekern.recipes.data import normalise
from sparsekern.recipes.measure import latency, macs
from sparsekern.recipes.settings import Settings
from sparsekern.recipes.synthetic import generate
from sparsekern.recipes.train import Trainer


def main(
    width: Annotated[list[int], typer.Option(help="of the UNet, may be repeated")] = [32, 64],  # noqa: B006
    keep: float = 0.1,
    round_to: int = 16,
    size: int = 256,
    steps: int = 30,
) -> None:
    """Time UNets of several widths before and after pruning."""
    table = Table("width", "MACs", "dense ms", "compact ms", "faster")
    image = normalise(generate(1, size, 1).image(0)[None]).contiguous(memory_format=torch.channels_last)
    for channels in width:
        settings = Settings(
            width=channels, keep=keep, round_to=round_to, steps=steps, batch=2, crop=64, evaluations=1
        )
        trainer = Trainer(settings, generate(16, 64, 0), generate(2, 64, 1))
        trainer.run()
        assert trainer.pruner is not None
        small = trainer.pruner.compact()
        share = macs(small, image) / macs(trainer.model, image)
        seconds = latency({"dense": trainer.model, "compact": small}, image)
        table.add_row(
            str(channels),
            f"{share:.1%}",
            f"{seconds['dense'] * 1e3:.1f}",
            f"{seconds['compact'] * 1e3:.1f}",
            f"{seconds['dense'] / seconds['compact']:.2f}x",
        )
    console = Console()
    console.print(table)
    console.print(environment())


if __name__ == "__main__":
    typer.run(main)
