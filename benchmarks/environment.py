"""Where a measurement was made: what every result file says about itself."""

from __future__ import annotations

import subprocess
from typing import Any

import torch

from sparsekern import _info


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
