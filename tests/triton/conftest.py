"""Triton kernels on the CPU, in triton's interpreter.

What needs a GPU is in `tests/cuda/test_device.py`, which is collected where there is one. There triton
interprets nothing unless ``TRITON_INTERPRET=1`` says so.
"""

from __future__ import annotations

import importlib.util
import os

# A folder of this name is found in its place where it is not installed.
_spec = importlib.util.find_spec("triton")
_installed = _spec is not None and _spec.origin is not None
collect_ignore_glob = []
if not _installed or os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob.append("test_*.py")
else:
    from triton_interpreter import mend

    mend()
