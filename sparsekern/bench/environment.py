"""The environment of a measurement: machine, versions, threads, commit and memory settings."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import sparsekern
from sparsekern import info

# Options of glibc's mallopt with its own defaults (malloc.h).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULTS = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 128 * 1024}
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}


@contextmanager
def kept_memory() -> Iterator[str]:
    """Keep freed memory in the process during the block, instead of returning it to the system.

    Otherwise page faults of large tensors take half of the measured time.

    Yields:
        The setting in force: ``kept``, or ``default`` where the C library is not glibc.
    """
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is None:
        yield "default"
        return
    try:
        for option, value in _KEEP.items():
            mallopt(option, value)
        yield "kept"
    finally:
        for option, value in _DEFAULTS.items():
            mallopt(option, value)
        libc.malloc_trim(0)


def environment() -> dict[str, Any]:
    """Machine, versions, threads and commit, as plain data."""
    machine, versions = info.machine(), info.versions()
    return {
        "machine": machine["cpu"],
        "isa": machine["isa"],
        "threads": torch.get_num_threads(),
        "torch": versions["torch"],
        "sparsekern": versions["sparsekern"],
        "commit": commit(),
    }


def commit() -> str:
    """The commit of this package's repository, with ``+`` after it for local changes; else ``unknown``."""
    folder = Path(sparsekern.__file__).parent
    try:
        # An installed package may lie inside the repository of another project.
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        head = _git(folder, "rev-parse", "--short", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
