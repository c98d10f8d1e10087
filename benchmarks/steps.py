"""Time of a step with a Pruner's work over torch's fused step, for the parameters of four networks.

    python -m benchmarks.steps [--json FILE]

It times ``optimizer.step()`` as a whole, one thread, float32, with all channels and with half and four fifths
of them masked at random. The output has medians and quartiles of the ratios in 44 interleaved rounds, 11 in
each of four memory locations.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment
from benchmarks.networks import NETWORKS
from sparsekern.bench import networks
from sparsekern.bench.cases import Case
from sparsekern.bench.comparison import OURS
from sparsekern.bench.suite import Report, Suite
from sparsekern.files.atomic import replacing

LISTS = ("resnet18", "mobilenet_v3_large", "unet-31m", "unet-2m")
STEPS = {"AdamW": "adamw-step", "SGD, momentum": "sgd-step"}
MASKED = (0.0, 0.5, 0.8)
PLACEMENTS, ROUNDS = 4, 11


def measure(console: Console) -> Report:
    for name in LISTS:
        networks.NETWORKS.setdefault(name, networks.Network(NETWORKS[name]))
    cases = [Case(op, name, masked=share) for op in STEPS.values() for name in LISTS for share in MASKED]
    return Suite(PLACEMENTS, ROUNDS).run(cases, lambda case: console.print(str(case)))


def table_of(report: Report) -> Table:
    table = Table(title="ours over torch's fused step")
    for column in ("step", "parameters of", "ms", *(f"{share:.0%} masked" for share in MASKED)):
        table.add_column(column, justify="left" if column in ("step", "parameters of") else "right")
    for title, op in STEPS.items():
        for name in LISTS:
            rows = [r for r in report.results if (r.case.op, r.case.tensors) == (op, name)]
            spreads = [row.over["torch fused"] for row in rows]
            figures = [f"{s.median:.2f} ({s.q1:.2f}-{s.q3:.2f})" for s in spreads]
            table.add_row(title, name, f"{1e3 * rows[0].seconds[OURS].median:.2f}", *figures)
    return table


Figures = Annotated[Path | None, typer.Option("--json", help="Where all figures go.")]


def run(
    measure: Callable[[Console], Report], table_of: Callable[[Report], Table], figures: Path | None
) -> None:
    """Measure on one thread; print a table and the environment, and write all figures to a file if asked."""
    torch.set_num_threads(1)
    report = measure(Console(stderr=True))
    console = Console()
    console.print(table_of(report))
    console.print(environment(), soft_wrap=True)
    if figures is not None:
        with replacing(figures) as path:
            path.write_text(json.dumps(report.plain(), indent=1) + "\n")


def main(figures: Figures = None) -> None:
    run(measure, table_of, figures)


if __name__ == "__main__":
    typer.run(main)
