"""Time of a step with a Pruner's work over torch's fused step, for layers of one kind at a time.

    python -m benchmarks.layers [--json FILE]

The kernels have a loop for each layout of rows: long ones, short ones, ones that are not contiguous. The
parameters of a network mix them, so that a slow loop hides among others. It times ``optimizer.step()`` as
:mod:`benchmarks.steps` does, with all channels, one thread, float32.
"""

from __future__ import annotations

import functools

import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.steps import PLACEMENTS, ROUNDS, STEPS, Figures, run
from sparsekern.bench import networks
from sparsekern.bench.cases import Case
from sparsekern.bench.suite import Report, Suite

# Kernel size, channels in and out, and number of layers: two to twenty million parameters each.
SQUARE = {"3x3, 1024": (3, 1024, 1024, 1), "3x3, 256": (3, 256, 256, 6)}
POINTWISE = {
    f"1x1, {wide}": (1, wide, out, n) for wide, out, n in ((1280, 1280, 3), (160, 960, 15), (40, 240, 200))
}
KINDS = {
    **SQUARE,
    **POINTWISE,
    "transposed 2x2, 512": (2, 512, 512, 8),
    "depthwise 5x5, 960": (5, 960, 960, 80),
}


def layers_of(kind: str) -> nn.Module:
    """A chain of layers of one kind between two small ones."""
    size, wide, out, n = KINDS[kind]
    pairs: list[nn.Module] = []
    for _ in range(n):
        if kind.startswith("transposed"):
            pairs.append(nn.ConvTranspose2d(wide, out, size, bias=False))
        elif kind.startswith("depthwise"):
            pairs.append(nn.Conv2d(wide, out, size, padding=size // 2, groups=wide, bias=False))
        else:
            pairs += [
                nn.Conv2d(i, o, size, padding=size // 2, bias=False) for i, o in ((wide, out), (out, wide))
            ]
    return nn.Sequential(nn.Conv2d(3, wide, 1), *pairs, nn.Conv2d(wide, 1, 1))


def measure(console: Console) -> Report:
    for kind in KINDS:
        networks.NETWORKS.setdefault(kind, networks.Network(functools.partial(layers_of, kind), edge=8))
    cases = [Case(op, kind, masked=0.0) for kind in KINDS for op in STEPS.values()]
    return Suite(PLACEMENTS, ROUNDS).run(cases, lambda case: console.print(str(case)))


def table_of(report: Report) -> Table:
    table = Table(title="ours over torch's fused step")
    for column in ("layers", *STEPS):
        table.add_column(column, justify="left" if column == "layers" else "right")
    for kind in KINDS:
        rows = {r.case.op: r.over["torch fused"] for r in report.results if r.case.tensors == kind}
        table.add_row(
            kind, *(f"{(s := rows[op]).median:.2f} ({s.q1:.2f}-{s.q3:.2f})" for op in STEPS.values())
        )
    return table


def main(figures: Figures = None) -> None:
    run(measure, table_of, figures)


if __name__ == "__main__":
    typer.run(main)
