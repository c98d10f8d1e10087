"""Triton kernels on the CPU, in triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

# Read where triton is imported, if tests/conftest.py was not.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A folder of this name is found in its place where it is not installed.
_spec = importlib.util.find_spec("triton")
collect_ignore_glob = ["test_*.py"] if _spec is None or _spec.origin is None else []
