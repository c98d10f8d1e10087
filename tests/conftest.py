"""For all tests: where there is no GPU, triton interprets.

That is read where triton is imported. ``torch.utils.flop_counter`` does so with sparsekern, which tests
that come before those of triton have imported.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
