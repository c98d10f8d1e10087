"""Every op on every backend against the reference, as one table: ``python -m benchmarks.parity``.

The problems are those of ``tests/kernels``: odd shapes, rows along any dimension, gaps between elements,
poison around them, NaN in masked rows and channels. Each backend, and each instruction set of the CPU, runs
them in a process of its own; the CUDA kernels run in the emulation of ``tests/cuda`` where there is a C++
compiler, the Triton kernels in triton's interpreter (some of the problems, as a step takes a second there). A
cell counts the problems, and for steps in how many of them all results are the reference's bits; in the
others they are within the tolerances of :mod:`sparsekern.kernels.backends.tolerance` and of
``sparsekern/kernels/selfcheck/norms.py``, or the cell says WRONG and the exit code is 1. It takes a quarter
of an hour on two cores, most of it in the emulation and the interpreter.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment
from sparsekern.kernels import backends
from sparsekern.kernels import ops as _ops
from sparsekern.kernels.backends import reference
from sparsekern.kernels.backends.reference.norm_act import ACTIVATIONS

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from kernels.norm_cases import assert_equals_reference
from kernels.tolerance import assert_equal_step

from sparsekern.kernels.selfcheck import norms
from sparsekern.kernels.selfcheck.calls import OPS, Op
from sparsekern.kernels.selfcheck.problems import DTYPES, LAYOUTS, ROW_STATES, Problem, problem

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
Call = Callable[[Op, Problem], None]


# Layouts and states of rows that the interpreter gets.
INTERPRETED = (
    ("contiguous", "some masked, some fading"),
    ("channels_last", "all fading"),
    ("permuted", "some masked, some fading"),
    ("all with holes", "all masked"),
)


def examine(
    call: Call, backend: ModuleType, which: Iterable[tuple[str, str]], shapes: Sequence[tuple[int, ...]]
) -> dict[str, Any]:
    """By op and dtype: problems, those with the reference's bits, errors. digest: of all that was written.

    Args:
        call: makes a step.
        backend: has the normalisations.
        which: layouts and states of rows.
        shapes: of what is normalised.
    """
    cells: dict[str, dict[str, Any]] = {}
    digest = hashlib.sha256()
    pairs = list(which)
    for name, dtype in itertools.product(OPS, DTYPES):
        cell = cells[f"{name}/{dtype}".replace("torch.", "")] = {"count": 0, "bits": 0, "errors": []}
        for layout, row_state in pairs:
            want = problem(dtype, layout, row_state, seed=5)
            before, got = want.clone(), want.clone()
            OPS[name].call(reference, want)
            call(OPS[name], got)
            cell["count"] += 1
            cell["bits"] += _same_bits(got, want)
            try:
                assert_equal_step(got, want, before)
            except AssertionError as error:
                cell["errors"].append(f"{layout}, {row_state}: {error}")
            if dtype is not torch.float16:
                for entry in got.entries().values():
                    digest.update(entry.buffer.view(torch.uint8).numpy().tobytes())
    for activation, dtype in itertools.product(ACTIVATIONS, DTYPES):
        cells[f"norm {activation}/{dtype}".replace("torch.", "")] = _examine_norm(
            backend, activation, dtype, shapes, digest
        )
    return {"cells": cells, "digest": digest.hexdigest()}


def _examine_norm(
    backend: ModuleType, activation: str, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]], digest: Any
) -> dict[str, Any]:
    """Both passes of a normalisation, as a cell."""
    cell: dict[str, Any] = {"count": 0, "errors": []}
    kinds = itertools.product(shapes, norms.FORMATS, (True, False), (0.0, 0.4))
    for shape, memory, training, masked in kinds:
        options = {"training": training, "masked": masked, "residual": training}
        given = norms.problem(shape, dtype, memory, activation, **options)
        cell["count"] += 1
        try:
            assert_equals_reference(backend, given)
        except AssertionError as error:
            cell["errors"].append(f"{shape}, {memory}, {options}: {error}")
        y, mean, var = given.forward(backend)
        for found in (y, *given.backward(backend, mean, var)):
            if found is not None and dtype is not torch.float16:
                digest.update(found.contiguous().view(torch.uint8).numpy().tobytes())
    return cell


def _same_bits(got: Problem, want: Problem) -> bool:
    return all(
        torch.equal(mine.buffer.view(torch.uint8), theirs.buffer.view(torch.uint8))
        for mine, theirs in zip(got.entries().values(), want.entries().values(), strict=True)
    )


def _straight_to(functions: ModuleType) -> Call:
    return lambda op, on: op.call(functions, on)


def native() -> dict[str, Any]:
    """The CPU backend with the instruction set of this process."""
    pairs = itertools.product(LAYOUTS, ROW_STATES)
    backend = backends.choose(torch.device("cpu"))
    return examine(_straight_to(_ops), backend, pairs, norms.SHAPES[:4])


def emulated() -> dict[str, Any]:
    """The CUDA backend on CPU tensors, its kernels compiled as C++."""
    from cuda.emulated import build, installed

    with tempfile.TemporaryDirectory() as folder, installed(build(Path(folder))) as backend:
        pairs = itertools.product(LAYOUTS, ROW_STATES)
        return examine(_straight_to(backend), backend, pairs, norms.SHAPES[:4])


def interpreted() -> dict[str, Any]:
    """The Triton backend on CPU tensors."""
    from triton_interpreter import mend

    from sparsekern.kernels.backends import triton

    mend()
    return examine(_straight_to(triton), triton, INTERPRETED, norms.SHAPES[1:2])


def _isas() -> list[str]:
    """Instruction sets of this machine, from the error that names them."""
    code = "from sparsekern.kernels import native as _native; _native.load()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=_environment("none")
    )
    return re.findall(r"\w+", done.stderr.strip().rpartition(": ")[2])


def _environment(isa: str, backend: str = "cpu") -> dict[str, str]:
    return os.environ | {"SPARSEKERN_CPU_ISA": isa, "SPARSEKERN_BACKEND": backend, "PYTHONPATH": str(ROOT)}


def _run(part: str) -> dict[str, Any]:
    isa = part.removeprefix("cpu ") if part.startswith("cpu ") else ""
    environment = _environment(isa) if isa else dict(os.environ, PYTHONPATH=str(ROOT))
    if part == "triton interpreted":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.parity", "--part", part]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{part}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(
    text: Annotated[Path, typer.Option(help="File for the table.")] = RESULTS / "parity.txt",
    part: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    torch.set_num_threads(1)
    if part:
        others = {"cuda emulated": emulated, "triton interpreted": interpreted}
        print(json.dumps(others.get(part, native)()))
        return
    isas = [f"cpu {isa}" for isa in _isas()]
    # The longest first.
    parts = ["triton interpreted", "cuda emulated", *isas]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(parts, pool.map(_run, parts), strict=True))
    parts = [*isas, "cuda emulated", "triton interpreted"]
    table = Table("op / dtype", *parts, title="problems (those with the reference's bits)")
    wrong: list[str] = []
    for key in next(iter(found.values()))["cells"]:
        cells = [found[name]["cells"][key] for name in parts]
        table.add_row(key, *(_cell(cell) for cell in cells))
        wrong += [f"{n}, {key}, {e}" for n, c in zip(parts, cells, strict=True) for e in c["errors"]]
    digests = {found[name]["digest"] for name in parts if name.startswith("cpu ")}
    same = "the same bits" if len(digests) == 1 else "DIFFERENT bits"
    with text.open("w") as file:
        for console in (Console(), Console(file=file, width=110)):
            console.print(table)
            console.print(f"instruction sets of the CPU among each other: {same}; {len(wrong)} wrong")
            for line in wrong[:20]:
                console.print(line)
            console.print(environment())
    if wrong or len(digests) != 1:
        raise typer.Exit(1)


def _cell(cell: dict[str, Any]) -> str:
    if cell["errors"]:
        return f"WRONG {len(cell['errors'])}"
    return f"{cell['count']} ({cell['bits']})" if "bits" in cell else str(cell["count"])


if __name__ == "__main__":
    typer.run(main)
