"""The CUDA kernels without a GPU, in an emulation.

Tests that need a GPU are in `test_device.py` and `test_norm_device.py`, collected only where there is one.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from cuda.emulated import COMPILER, build, installed

from sparsekern.kernels.native import cuda_library

collect_ignore: list[str] = []
if not torch.cuda.is_available():
    collect_ignore += ["test_device.py", "test_norm_device.py"]
if torch.cuda.is_available() or cuda_library.load() is None:
    collect_ignore.append("test_without_gpu.py")
if COMPILER is None:
    collect_ignore += ["test_emulated.py", "test_emulation.py", "test_mutants.py"]
    collect_ignore += ["test_norm_act.py", "test_sass.py"]


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA library with its kernels compiled for the CPU and run by fibers."""
    folder = tmp_path_factory.getbasetemp()
    # Each worker of pytest-xdist has a folder of its own in that of the run.
    return build(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)


@pytest.fixture
def emulated(emulated_library: ctypes.CDLL) -> Iterator[ModuleType]:
    """The backend, working on CPU tensors."""
    with installed(emulated_library) as backend:
        yield backend
