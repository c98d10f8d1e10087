"""Compiles the kernels of normalisation for a GPU, where there need not be one.

A script, as triton compiles nothing in a process in which it interprets: ``python compile_norm_act.py bf16``.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsekern.backends.triton import norm_act

TARGET = GPUTarget("cuda", 90, 32)

KERNELS = ("_moments", "_merge_moments", "_normalise", "_sum_up", "_merge_sums", "_descend", "_count")
TENSORS = ("x", "y", "grad", "residual", "grad_x", "grad_residual")
COMPUTED = ("weight", "bias", "mean", "var", "running_mean", "running_var", "grad_weight", "grad_bias")
ALWAYS = {"mask": "*u8", "parts": "*fp64", "sums": "*fp64"} | dict.fromkeys(
    ("threshold", "activity", "new_threshold", "new_activity"), "*fp32"
)
CONSTANTS = {
    "EPS": 1e-5,
    "ACTIVATION": norm_act.SILU.value,
    "TRAINING": True,
    "CHANNELS": 16,
    "OUTER": 2,
    "INNER": 64,
    "PIECES": 64,
    "TAU": 1.0,
    "DECAY": 0.99,
    "BLOCK": 1024,
}


def source(name: str, dtype: str) -> ASTSource:
    kernel: Any = getattr(norm_act, name)
    compute = "fp64" if dtype == "fp64" else "fp32"
    constants = CONSTANTS | {"COMPUTE": tl.float64 if compute == "fp64" else tl.float32}
    types = dict.fromkeys(TENSORS, f"*{dtype}") | dict.fromkeys(COMPUTED, f"*{compute}") | ALWAYS
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32")
        for argument in kernel.arg_names
    }
    used = {argument: value for argument, value in constants.items() if argument in signature}
    return ASTSource(fn=kernel, signature=signature, constexprs=used)


def main() -> None:
    for dtype in sys.argv[1:]:
        for name in KERNELS:
            options = {**norm_act.OPTIONS, "num_warps": norm_act.WARPS}
            compiled = triton.compile(source(name, dtype), target=TARGET, options=options)
            assert len(compiled.asm["cubin"]) > 0
            # Multiplications and additions are rounded one by one.
            assert "fma.rn.f32" not in compiled.asm["ptx"], name


if __name__ == "__main__":
    main()
