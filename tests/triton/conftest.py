"""Triton kernels on the CPU, in triton's interpreter."""

import os

# Read where triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
