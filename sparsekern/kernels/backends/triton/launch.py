"""What all launches of Triton kernels have in common."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

STORAGE = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
"""Types of tensors."""

DEVICE_TYPE = "cpu" if triton.knobs.runtime.interpret else "cuda"
"""Where tensors have to be."""

OPTIONS = {"enable_fp_fusion": False}
"""Multiplications and additions are rounded one by one, as in the reference."""


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def compute_type(dtype: torch.dtype) -> Any:
    """The type of the arithmetic on tensors of ``dtype``."""
    return tl.float64 if dtype is torch.float64 else tl.float32
