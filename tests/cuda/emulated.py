"""The CUDA backend on CPU tensors: kernels compiled through `emulation/`, with the same Python."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

from sparsekern import _cuda
from sparsekern.backends import cuda, cuda_norm
from sparsekern.backends._lists import Plans

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent / "emulation"

# No contraction, as nvcc is told; the kernels' own flags otherwise do not matter here.
FLAGS = (
    "-std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas"
)

COMPILER = next((c for c in (os.environ.get("CXX", ""), "g++") if c and shutil.which(c)), None)


def build(folder: Path) -> ctypes.CDLL:
    """The CUDA library, its kernels run by fibers."""
    csrc = ROOT / "csrc" / "cuda"
    sources = [*sorted(csrc.glob("*.cu")), *sorted(csrc.glob("*.cpp")), *sorted(EMULATION.glob("*.cpp"))]
    objects = []
    for source in sources:
        objects.append(str(folder / f"{source.stem}.o"))
        command = [str(COMPILER), *FLAGS.split(), f"-I{EMULATION}", f"-I{csrc}"]
        subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", objects[-1]], check=True)
    path = folder / "emulated.so"
    subprocess.run([str(COMPILER), "-shared", *objects, "-o", str(path)], check=True)
    return _cuda.bind(path)


@contextmanager
def installed(library: ctypes.CDLL) -> Iterator[ModuleType]:
    """The backend module, working on CPU tensors with that library meanwhile."""
    library.emulation_order(0)
    target = _cuda.Target(library, "cpu", 1)
    with (
        patch.object(cuda, "_target", target),
        patch.object(cuda_norm, "_target", target),
        patch.object(cuda, "_plans", Plans()),
        patch.object(_cuda, "stream", lambda device: 0),
        patch.object(_cuda, "capturing", lambda: False),
    ):
        yield cuda
