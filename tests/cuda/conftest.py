"""The CUDA kernels without a GPU: compiled as C++ through `emulation/`, called by the same Python.

What needs a GPU is in `test_device.py`, and collected where there is one.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekern import _cuda
from sparsekern.backends import cuda
from sparsekern.backends._lists import Plans

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent / "emulation"

# No contraction, as nvcc is told; the kernels' own flags otherwise do not matter here.
FLAGS = (
    "-std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas"
)

COMPILER = next((c for c in (os.environ.get("CXX", ""), "g++") if c and shutil.which(c)), None)

collect_ignore: list[str] = []
if not torch.cuda.is_available():
    collect_ignore.append("test_device.py")
if torch.cuda.is_available() or _cuda.load() is None:
    collect_ignore.append("test_without_gpu.py")
if COMPILER is None:
    collect_ignore += ["test_emulated.py", "test_emulation.py"]


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA library, its kernels run by fibers."""
    build = tmp_path_factory.mktemp("emulated")
    csrc = ROOT / "csrc" / "cuda"
    sources = [*sorted(csrc.glob("*.cu")), *sorted(csrc.glob("*.cpp")), *sorted(EMULATION.glob("*.cpp"))]
    objects = []
    for source in sources:
        objects.append(str(build / f"{source.stem}.o"))
        command = [str(COMPILER), *FLAGS.split(), f"-I{EMULATION}", f"-I{csrc}"]
        subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", objects[-1]], check=True)
    path = build / "emulated.so"
    subprocess.run([str(COMPILER), "-shared", *objects, "-o", str(path)], check=True)
    return _cuda.bind(path)


@pytest.fixture
def emulated(emulated_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend, working on CPU tensors."""
    emulated_library.emulation_order(0)
    monkeypatch.setattr(cuda, "_target", cuda.Target(emulated_library, "cpu", 1))
    monkeypatch.setattr(cuda, "_plans", Plans())
    monkeypatch.setattr(_cuda, "stream", lambda device: 0)
    monkeypatch.setattr(_cuda, "capturing", lambda: False)
    return cuda
