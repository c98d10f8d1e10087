"""The Triton kernels compile for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_every_kernel_compiles(tmp_path: Path) -> None:
    """For a GPU, in a process that does not interpret."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, script, "bf16"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
