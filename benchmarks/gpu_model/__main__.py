"""Predicts how much of the memory stream of a GPU a step reaches: predicted from the machine code, not
measured.

    python -m benchmarks.gpu_model [--machine-code FILE ...]

It needs no GPU. It reads the machine code of the installed CUDA library, or of other libraries or objects,
and needs ``cuobjdump`` and ``nvdisasm`` (see :mod:`benchmarks.sass`). The lists are those of
:mod:`benchmarks.steps`, with all parameters tracked. :mod:`benchmarks.gpu_model.machines` has the figures of
the GPUs, their sources and the assumptions, and :mod:`benchmarks.gpu_model.predict` the formulas.

A pair of shares is for the largest and the least latency of memory under load. What the model leaves out:
caches (small lists stay in the L2 cache from the backward pass), the clock under load, and the host.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.environment import commit
from benchmarks.gpu_model.kernels import OPERATIONS, Kernel, read
from benchmarks.gpu_model.machines import MACHINES
from benchmarks.gpu_model.predict import Tensor, predict
from benchmarks.networks import NETWORKS
from benchmarks.steps import LISTS
from sparsekern.kernels.backends.lists import memory_shape
from sparsekern.kernels.native import cuda_library

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
Kernels = dict[tuple[str, str, str], Kernel]

HEAD = """Predicted from the machine code, not measured: no kernel has run on a GPU.

Shares are of a plain stream of the GPU's memory (92 % of the published bandwidth), for all that a step takes:
its two launches (2 us each), the reads of a block that wait for each other, and its loop. Two shares: for the
largest latency of memory under load (that with which the bytes in flight that CUB asks for saturate it) and
for the least (twice that without load). In parentheses: what bounds the first launch at the largest latency.
Instructions are those of the longest way through the loop: statistics, every option, unscaled gradients.
Formulas, sources and assumptions: benchmarks/gpu_model.
"""


def tensors_of(model: nn.Module, element_size: int, library: ctypes.CDLL) -> list[Tensor]:
    """The parameters of a network with all rows tracked, divided by the library."""
    shapes, start = [], 0
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            is_transposed = isinstance(module, nn.ConvTranspose2d) and name == "weight"
            found = memory_shape(param, start, 1 if is_transposed else 0)
            assert found is not None
            shapes.append(found)
            start += found[1]
    of_library = (cuda_library.Shape * len(shapes))(*(cuda_library.Shape(*shape) for shape in shapes))
    cuts = (cuda_library.Cut * len(shapes))()
    library.sparsekern_cuda_cut(of_library, len(shapes), element_size, cuts)
    return [
        Tensor(*shape[:3], cut.outer_step, cut.row_step, cut.inner_step, cut.lanes, cut.chunks)
        for shape, cut in zip(shapes, cuts, strict=True)
    ]


def kernel_table(kernels: Kernels) -> Table:
    table = Table(title="kernels of a step (predicted, not measured)")
    for column in (
        "GPU",
        "step",
        "dtype",
        "registers",
        "blocks/SM",
        "packs ahead",
        "KB in flight/SM",
        "KB that saturate",
    ):
        table.add_column(column, justify="left" if column in ("GPU", "step", "dtype") else "right")
    for column in ("instructions/element", "float64 before"):
        table.add_column(column, justify="right")
    for machine in MACHINES:
        for (name, dtype, architecture), kernel in kernels.items():
            if architecture != machine.architecture:
                continue
            elements = kernel.packs * 16 // SIZES[dtype]
            numbers = (kernel.registers, kernel.blocks_on(machine), kernel.packs)
            kilobytes = (kernel.in_flight_on(machine) >> 10, machine.saturating >> 10)
            others = (
                f"{kernel.total / elements:.0f}",
                kernel.float64_before if name.startswith("Adam") else "",
            )
            row = (machine.name, OPERATIONS[name].title, dtype, *numbers, *kilobytes, *others)
            table.add_row(*map(str, row))
    return table


def share_table(kernels: Kernels, library: ctypes.CDLL) -> Table:
    table = Table(title="share of the memory stream (predicted, not measured)")
    for column in ("GPU", "step", "dtype", *LISTS):
        table.add_column(column, justify="right" if column in LISTS else "left")
    models = {name: NETWORKS[name]() for name in LISTS}
    lists = {
        (name, size): tensors_of(model, size, library)
        for name, model in models.items()
        for size in {SIZES[dtype] for _, dtype, _ in kernels}
    }
    for machine in MACHINES:
        for (name, dtype, architecture), kernel in kernels.items():
            if architecture != machine.architecture:
                continue
            cells = []
            for of_list in LISTS:
                tensors = lists[of_list, SIZES[dtype]]
                low, high = (
                    predict(tensors, kernel, OPERATIONS[name], SIZES[dtype], machine, latency)
                    for latency in reversed(machine.latencies)
                )
                cells.append(f"{low.share:.0%}-{high.share:.0%}, {1e6 * low.total:.0f} us ({low.bound})")
            table.add_row(machine.name, OPERATIONS[name].title, dtype, *cells)
    return table


def main(
    files: Annotated[
        list[Path] | None, typer.Option("--machine-code", help="Libraries or objects to read.")
    ] = None,
) -> None:
    library = cuda_library.load()
    if library is None:
        sys.exit(str(cuda_library.reason))
    kernels = read(files or [Path(library._name)])
    console = Console(width=172)
    console.print(HEAD, highlight=False)
    console.print(kernel_table(kernels))
    console.print(share_table(kernels, library))
    console.print(f"sparsekern {commit()}; predicted from machine code, none of it has been run on a GPU")


if __name__ == "__main__":
    typer.run(main)
