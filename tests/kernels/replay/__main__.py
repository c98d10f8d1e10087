"""Whether the kernels compute the same bits on Arm64 and by other compilers as in the installed core.

    python -m tests.kernels.replay arm64
    python -m tests.kernels.replay clang

Runs the long list of cases of `sparsekern selftest` (with ``--short`` the short list) on the CPU backend,
compares them with plain torch, and gives every native call to programs that repeat it: the same kernels,
compiled again. They compare all memory bit for bit. Arm64 code is compiled by a cross compiler and run by
qemu (Debian: ``g++-aarch64-linux-gnu qemu-user``).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from subprocess import PIPE
from typing import Annotated, Any

import torch
import typer

from sparsekern.kernels.backends import cpu
from sparsekern.kernels.selfcheck import cases
from sparsekern.kernels.selfcheck.cases import Case
from tests.kernels.replay.build import compile_replay
from tests.kernels.replay.machine_code import of_arm_objects
from tests.kernels.replay.record import END, Recorder, recording

CPU = torch.device("cpu")
CONTROL = "a call recorded with one bit changed"

ARM = ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump", "qemu-aarch64")
"""The tools for Arm64: compiler, disassembler, emulator."""


def missing(target: str) -> list[str]:
    """The programs that a target needs and this machine lacks."""
    needed = ARM if target == "arm64" else (compiler_of(target)[0],)
    return [name for name in needed if shutil.which(name) is None]


def compiler_of(target: str) -> list[str]:
    """The command of the C++ compiler of a target."""
    return {"arm64": [ARM[0]], "clang": ["clang++"], "gcc": ["g++"]}.get(target) or shlex.split(target)


def programs(target: str, isas: list[str], folder: Path) -> dict[str, list[str]]:
    """The commands that repeat calls, by instruction set; compiles the kernels."""
    if target == "arm64":
        program = compile_replay(compiler_of(target), ["baseline"], folder)
        return {"baseline": [ARM[2], str(program)]}
    program = compile_replay(compiler_of(target), isas, folder)
    return {isa: [str(program), isa] for isa in isas}


def replayed(commands: dict[str, list[str]], *, short: bool = False) -> dict[str, dict[str, Any]]:
    """Run the cases here, repeat every call in the programs, and return their counts by instruction set.

    Raises:
        AssertionError: a case differs from plain torch here.
        RuntimeError: a program did not end as it should.
    """
    running = {isa: subprocess.Popen(command, stdin=PIPE, stdout=PIPE) for isa, command in commands.items()}

    def write(call: bytes) -> None:
        for program in running.values():
            assert program.stdin is not None
            program.stdin.write(call)

    recorder = Recorder(write)
    count = 0

    def examine(case: Case) -> None:
        difference = case.examine(cpu, CPU)
        assert difference is None, f"{case.name}: {difference}"

    with recording(recorder):
        for case in cases.first_use() if short else cases.every():
            recorder.name = case.name
            examine(case)
            count += 1
        recorder.name, recorder.spoils = CONTROL, True
        examine(next(cases.first_use()))
    write(END)
    return {isa: {"cases": count} | _counts(program) for isa, program in running.items()}


def _counts(program: subprocess.Popen[bytes]) -> dict[str, Any]:
    """What a program has counted, without the last call, in which it has to find a difference."""
    text, _ = program.communicate()
    if program.returncode != 1:
        raise RuntimeError(f"{program.args}: got exit status {program.returncode}, expected 1")
    counts: dict[str, Any] = json.loads(text)
    if not counts.pop("last_is_different"):
        raise RuntimeError(f"{program.args}: {CONTROL} was not noticed")
    return counts | {"calls": counts["calls"] - 1, "different": counts["different"] - 1}


def check(target: str, isas: list[str], folder: Path, *, short: bool) -> bool:
    """Compile, run, and print what was compared; whether all is equal."""
    start = time.perf_counter()
    commands = programs(target, isas, folder)
    print(f"{target}: compiled in {time.perf_counter() - start:.0f} s", flush=True)
    start = time.perf_counter()
    found = replayed(commands, short=short)
    for isa, counts in found.items():
        print(
            f"{target} {isa}: {counts['cases']} cases, {counts['calls']} calls, {counts['tensors']} tensors, "
            f"{counts['elements']} numbers, {counts['different']} calls differ"
        )
    print(f"{target}: compared in {time.perf_counter() - start:.0f} s")
    equal = not any(counts["different"] for counts in found.values())
    return equal and (target != "arm64" or uses_vectors(folder))


def uses_vectors(folder: Path) -> bool:
    """Print the instructions of each kernel; whether most arithmetic is on vectors and none is fused."""
    good = True
    for name, code in of_arm_objects(folder, ARM[1]):
        print(f"{name:20} vectors {code.vector:5}, scalars {code.scalar:5}, fused {code.fused}")
        # The rows after a step are few, and that loop is left to the compiler.
        good = good and code.fused == 0 and (name == "finish" or code.vector > code.scalar)
    return good


def main(
    target: Annotated[str, typer.Argument(help="arm64, clang, gcc, or the command of a C++ compiler")],
    isas: Annotated[str, typer.Option(help="instruction sets, separated by commas")] = "v4,v3,baseline",
    short: Annotated[bool, typer.Option(help="The short list of cases.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Where objects are kept.")] = None,
) -> None:
    """See the head of the file."""
    if lacking := missing(target):
        print(f"{target}: not compared: there is no {', '.join(lacking)}", file=sys.stderr)
        raise typer.Exit(3)
    with tempfile.TemporaryDirectory() as temporary:
        if not check(target, isas.split(","), folder or Path(temporary), short=short):
            raise typer.Exit(1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    typer.run(main)
