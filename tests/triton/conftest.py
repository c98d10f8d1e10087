"""Triton kernels on the CPU, in Triton's interpreter.

Tests that need a GPU are in `tests/cuda/test_device.py` and are collected only on a machine with one. There
Triton interprets nothing unless ``TRITON_INTERPRET=1`` is set.
"""

from __future__ import annotations

import importlib.util
import os

# If Triton is not installed, this folder of the same name is found instead.
_spec = importlib.util.find_spec("triton")
_installed = _spec is not None and _spec.origin is not None
collect_ignore_glob = []
if not _installed or os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob.append("test_*.py")
else:
    from triton_interpreter import mend

    mend()
