"""The tests of the kernels notice when a barrier is missing, and ThreadSanitizer finds no race.

What compiles and runs programs takes minutes: `SPARSEKERN_MUTANTS=1 pytest tests/cuda/test_mutants.py`, or
`python tests/cuda/mutants.py` for a line for each barrier.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from cuda.mutants import COMPILER, CSRC, EMULATION, FLAGS, RACES, Barrier, Program, barriers, noticed, without

runs = pytest.mark.skipif("SPARSEKERN_MUTANTS" not in os.environ, reason="SPARSEKERN_MUTANTS=1 runs it")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(tmp_path_factory.mktemp("plain")).build()


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(tmp_path_factory.mktemp("sanitized"), sanitized=True).build()


@pytest.mark.parametrize("barrier", list(barriers()), ids=str)
def test_one_barrier_is_removed(barrier: Barrier, tmp_path: Path) -> None:
    before = (CSRC / "cuda" / barrier.file).read_text().splitlines()
    after = (without(barrier, tmp_path) / "cuda" / barrier.file).read_text().splitlines()
    changed = [line for line, (one, two) in enumerate(zip(before, after, strict=True), 1) if one != two]
    assert changed == [barrier.line]
    assert before[barrier.line - 1].replace("__syncthreads();", ";", 1) == after[barrier.line - 1]


@pytest.mark.parametrize("name", ["kernels.cpp", "drive.cpp"])
def test_the_program_fits_the_kernels(name: str) -> None:
    includes = (f"-I{EMULATION}", f"-I{CSRC / 'cuda'}")
    subprocess.run([COMPILER, *FLAGS, *includes, "-fsyntax-only", "-x", "c++", str(RACES / name)], check=True)


@runs
def test_there_is_no_race(sanitized: Program) -> None:
    assert sanitized.races() == set()


@runs
@pytest.mark.parametrize("barrier", list(barriers()), ids=str)
def test_a_missing_barrier_is_noticed(
    barrier: Barrier, tmp_path: Path, plain: Program, sanitized: Program
) -> None:
    assert noticed(barrier, tmp_path, plain, sanitized)
