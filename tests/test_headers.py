"""Native headers can be included alone. ``SPARSEKERN_HEADERS=1`` compiles all of them: half a minute."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
COMPILER = next((c for c in (os.environ.get("CXX", ""), "g++", "clang++") if c and shutil.which(c)), None)
HEADERS = sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")])
QUICK = ("abi.h", "update.h", "cpu/isa/values.h", "cuda/sums.cuh")
CHOSEN = HEADERS if os.environ.get("SPARSEKERN_HEADERS") == "1" else [CSRC / name for name in QUICK]


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("header", CHOSEN, ids=lambda header: str(header.relative_to(CSRC)))
def test_a_header_compiles_alone(header: Path) -> None:
    command = [str(COMPILER), "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-x", "c++", "-"]
    command += ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
    if "cpu" in header.parts:
        command += ["-DSPARSEKERN_ISA=baseline", "-DSPARSEKERN_DTYPE=float32"]
    if "cuda" in header.parts:
        command += ["-Wno-unknown-pragmas", f"-I{ROOT / 'tests/cuda/emulation'}", f"-I{CSRC / 'cuda'}"]
    result = subprocess.run(command, input=f'#include "{header}"\n', capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_header_begins_with_a_description_and_a_guard() -> None:
    for header in HEADERS:
        text = header.read_text()
        first, _, rest = text.partition("#pragma once")
        assert rest and first.startswith("// ") and all(line.startswith("//") for line in first.splitlines())
