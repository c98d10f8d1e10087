"""For all tests: without a GPU, Triton interprets its kernels.

Triton reads this variable when it is imported. Importing sparsekern imports ``torch.utils.flop_counter``, and
that imports Triton, so the variable must be set before any test does.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
