"""The report of machine code finds its names in the symbols of the kernels."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

import pytest

from benchmarks.sass import PASSES, UPDATES, readable


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm to list symbols")
def test_every_kernel_has_a_readable_name(emulated_library: ctypes.CDLL) -> None:
    listed = subprocess.run(["nm", emulated_library._name], capture_output=True, text=True, check=True).stdout
    kernels = re.findall(r"\b_ZN10sparsekern4cuda(?:4step|9norm_pass)I\w+", listed)
    named = {readable(symbol) for symbol in kernels}
    for name in UPDATES.values():
        for dtype in ("float32", "float64", "bfloat16", "float16"):
            assert {f"{name} {dtype}", f"{name} short list {dtype}"} <= named
    assert all(any(name.startswith(kind) for name in named) for kind in PASSES.values())
    assert "epilogue" not in named
