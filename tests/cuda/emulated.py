"""The CUDA backend on CPU tensors: kernels compiled through `emulation/`, with the same Python."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

from sparsekern.kernels.backends import cuda
from sparsekern.kernels.backends.cuda import norm_act as cuda_norm
from sparsekern.kernels.backends.cuda import step as cuda_step
from sparsekern.kernels.native import cuda_library

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent / "emulation"
SHARED = EMULATION / "shared.ld"

# No contraction, as nvcc is told; the kernels' own flags otherwise do not matter here.
FLAGS = (
    "-std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas"
)

COMPILER = next((c for c in (os.environ.get("CXX", ""), "g++") if c and shutil.which(c)), None)


def build(folder: Path) -> ctypes.CDLL:
    """The CUDA library, its kernels run by fibers; made once for all processes that name this folder."""
    path = folder / "emulated.so"
    with (folder / "emulated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(folder, path)
    return cuda_library.bind(path)


def _compile(folder: Path, path: Path) -> None:
    csrc = ROOT / "csrc" / "cuda"
    sources = [*sorted(csrc.glob("*.cu")), *sorted(csrc.glob("*.cpp")), *sorted(EMULATION.glob("*.cpp"))]
    command = [str(COMPILER), *FLAGS.split(), f"-I{EMULATION}", f"-I{csrc}"]

    def compiled(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    linked = folder / "linked.so"
    subprocess.run([str(COMPILER), "-shared", *objects, f"-Wl,-T,{SHARED}", "-o", str(linked)], check=True)
    linked.rename(path)


@contextmanager
def installed(library: ctypes.CDLL) -> Iterator[ModuleType]:
    """The backend module, working on CPU tensors with that library meanwhile."""
    library.emulation_order(0, False)
    target = cuda_library.Target(library, "cpu", 1)
    with (
        patch.object(cuda_step, "_target", target),
        patch.object(cuda_norm, "_target", target),
        patch.object(cuda_step._steps, "plans", {}),
        patch.object(cuda_library, "stream", lambda device: 0),
        patch.object(cuda_library, "capturing", lambda: False),
    ):
        yield cuda
