"""The Triton kernels compile for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def _run(argument: str, cache: Path) -> str:
    """The output of the script, in a process that does not interpret."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    result = subprocess.run(
        [sys.executable, script, argument], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_kernel_compiles(tmp_path: Path) -> None:
    _run("bf16", tmp_path)


def test_shrinks_and_batches_compile_few_variants(tmp_path: Path) -> None:
    """The keys under which Triton keeps what it compiled, for 54 layers of three shapes."""
    found = {name: int(number) for name, number in map(str.split, _run("variants", tmp_path).splitlines())}
    small = {"merge_moments", "merge_sums", "count", "fold_channels"}
    assert small <= found.keys() and {found[name] for name in small} == {1}
    # Numbers of channels that are multiples of 16, and others, for each shape.
    tiles = {found[name] for name in found.keys() - small}
    assert len(found) == 8 and tiles == {6}
