"""Networks of many kinds, folded and exported: ``python -m benchmarks.exports``.

Every network is exported twice, as it is and after ``sparsekern.deploy``, to ONNX and where OpenVINO is
installed to its IR. The table has the largest difference of any output between torch and the runtime over its
largest magnitude, on the example, on another batch size, and where the network allows it on another height
and width; and what was folded. Exit code 1 if an export fails or differs by more than 1e-5.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import sparsekern
from benchmarks.environment import environment
from benchmarks.export_networks import CASES, Case
from benchmarks.saved import save
from sparsekern.deploy.fold import batch_norms
from sparsekern.runtimes import installed, version

SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".xml"}


def row(case: Case, folder: Path, runtimes: list[str]) -> tuple[list[str], bool]:
    """The cells of one network, and whether all of its exports succeeded."""
    network, example = case.network(), case.example()
    deployed = sparsekern.deploy(network, example)
    before, after = (sum(1 for _ in batch_norms(model)) for model in (network, deployed))
    cells, good = (
        [f"{before - after} of {before}", f"{sparsekern.verify(network, deployed, example):.1e}"],
        True,
    )
    for runtime in runtimes:
        for model in (network, deployed):
            cell, fine = export(model, folder / f"network{SUFFIXES[runtime]}", case)
            cells.append(cell)
            good = good and fine
    return cells, good


def export(model: nn.Module, path: Path, case: Case) -> tuple[str, bool]:
    """The difference of one export, or the first words of its error; and whether it succeeded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return f"{sparsekern.export(model, path, case.example(), dynamic=case.dynamic):.1e}", True
    except ValueError as error:
        return str(error)[:60], False


def main(
    output: Annotated[str, typer.Option(help="name of the file in benchmarks/results; none to print")] = "",
    only: Annotated[str, typer.Option(help="one network alone")] = "",
) -> None:
    """Export all networks and compare."""
    torch.set_num_threads(1)
    runtimes = [runtime for runtime in installed() if runtime in SUFFIXES]
    columns = [f"{runtime}{form}" for runtime in runtimes for form in ("", ", deployed")]
    table = Table("network", "norms folded", "deploy", *columns, "dynamic")
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            if only and name != only:
                continue
            cells, fine = row(case, Path(folder), runtimes)
            table.add_row(name, *cells, "batch, size" if case.dynamic is True else str(case.dynamic))
            good = good and fine
    console = Console(width=150, record=True)
    console.print(table)
    console.print(environment() | {runtime: version(runtime) for runtime in runtimes})
    if output:
        save(output, console)
    sys.exit(not good)


if __name__ == "__main__":
    typer.run(main)
