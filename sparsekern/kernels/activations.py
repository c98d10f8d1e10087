"""The activations behind a normalisation, and the type that it computes in."""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = ("identity", "relu", "relu6", "hardswish", "silu")
"""What may follow the normalisation. All of them are 0 at 0."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """In what type the kernels compute with ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
