"""Where a measurement was made: what every result file says about itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from sparsekern import _info

# With these, memory that a tensor gave back is not returned to the system, and its pages not made anew.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


def with_allocator(module: str, run: Callable[[], Any]) -> None:
    """Call ``run``, in this process or as ``python -m module`` in one that :data:`ALLOCATOR` is set in."""
    if os.environ.items() >= ALLOCATOR.items():
        run()
    else:
        # glibc reads these once, at the start of a process.
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], os.environ | ALLOCATOR)


def environment() -> dict[str, Any]:
    """Machine, versions, threads and commit, as plain data."""
    machine, versions = _info.machine(), _info.versions()
    return {
        "machine": machine["cpu"],
        "isa": machine["isa"],
        "threads": torch.get_num_threads(),
        "torch": versions["torch"],
        "sparsekern": versions["sparsekern"],
        "commit": commit(),
    }


def commit() -> str:
    """The commit of the working tree, with ``+`` when it has changes, or ``unknown`` outside of git."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")
