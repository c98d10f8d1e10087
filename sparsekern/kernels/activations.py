"""Activations that may follow a normalisation, and the compute type of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = ("identity", "relu", "relu6", "hardswish", "silu")
"""Names of the activations. Each of them maps 0 to 0."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype in which the kernels compute: float64 for float64 ``x``, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
