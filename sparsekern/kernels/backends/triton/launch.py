"""Types, options and device of all launches of Triton kernels."""

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
"""Triton types of the supported tensor dtypes."""

DEVICE_TYPE = "cpu" if triton.knobs.runtime.interpret else "cuda"
"""Device type of all tensors; ``"cpu"`` in Triton's interpreter."""

OPTIONS = {"enable_fp_fusion": False}
"""Compiler options: without fusion, each multiplication and addition is rounded, as in the reference."""


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context with the device of ``tensor`` as the current device, on which kernels are launched."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def compute_type(dtype: torch.dtype) -> Any:
    """The Triton type of arithmetic on tensors of ``dtype``: float64 for float64, else float32."""
    return tl.float64 if dtype is torch.float64 else tl.float32
