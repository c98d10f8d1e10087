"""Compiles the kernels for a GPU; no GPU is needed.

This is a script, ``python compile_kernels.py bf16``, because Triton compiles nothing in a process in which it
interprets.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsekern.kernels.backends.triton import (
    finish_kernels,
    norm_act,
    norm_backward_kernels,
    norm_forward_kernels,
    plan,
    step_kernels,
)
from sparsekern.kernels.backends.triton.launch import OPTIONS, STORAGE, compute_type
from sparsekern.kernels.backends.triton.norm_elements import SILU
from sparsekern.kernels.backends.triton.table import OPTIONS as FLAGS
from sparsekern.kernels.options import ADAM, MASK, SGD, STATISTICS

TARGET = GPUTarget("cuda", 90, 32)

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}

NORM = {
    norm_forward_kernels: ("moments", "merge_moments", "normalise"),
    norm_backward_kernels: ("sum_up", "merge_sums", "descend", "count"),
}
TENSORS = ("x", "y", "grad", "residual", "grad_x", "grad_residual")
COMPUTED = ("weight", "bias", "mean", "var", "running_mean", "running_var", "grad_weight", "grad_bias")
ALWAYS = (
    {"mask": "*u8", "parts": "*fp64", "sums": "*fp64"}
    | dict.fromkeys(("threshold", "activity", "new_threshold", "new_activity"), "*fp32")
    | {"table": "*i64", "shapes": "*i64", "owners": "*i32"}
    | dict.fromkeys(("lr", "grad_scale", "found_inf"), "*fp32")
    | dict.fromkeys(("offsets", "gates"), "*i64")
    | dict.fromkeys(("means", "mean_squares", "pending"), "*fp32")
    | {"decay": "fp32", "one_minus_decay": "fp32"}
)
NORM_CONSTANTS = {
    "EPS": 1e-5,
    "ACTIVATION": SILU.value,
    "TRAINING": True,
    "CHANNELS": 16,
    "OUTER": 2,
    "INNER": 64,
    "PIECES": 64,
    "TAU": 1.0,
    "DECAY": 0.99,
    "BLOCK": 1024,
}
STEPS: dict[str, tuple[int, set[str]]] = {
    "sgd": (SGD, {"has_momentum", "nesterov"}),
    "adamw": (ADAM, {"decoupled", "lerp_from_start", "amsgrad"}),
    "statistics": (STATISTICS, set()),
    "mask": (MASK, set()),
}


def compiled(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], warps: int) -> Any:
    """``kernel`` compiled for :data:`TARGET`, with all addresses aligned to sixteen bytes."""
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, ALWAYS.get(name, "i32")) for name in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")
    }
    used = {name: value for name, value in constants.items() if name in signature}
    source = ASTSource(fn=kernel, signature=signature, constexprs=used, attrs=aligned)
    return triton.compile(source, target=TARGET, options={**OPTIONS, "num_warps": warps})


def all_of(dtype: str) -> Iterator[tuple[str, Any, bool]]:
    """Every kernel: its name, the compiled kernel, and whether it must have accesses of sixteen bytes."""
    compute = "fp64" if dtype == "fp64" else "fp32"
    computed = {"COMPUTE": compute_type(DTYPES[dtype])}
    types = dict.fromkeys(TENSORS, f"*{dtype}") | dict.fromkeys(COMPUTED, f"*{compute}")
    for module, names in NORM.items():
        for name in names:
            kernel = getattr(module, name)
            yield name, compiled(kernel, types, NORM_CONSTANTS | computed, norm_act.WARPS), False
    for name, (op, chosen) in STEPS.items():
        flags = sum(1 << i for i, flag in enumerate(FLAGS) if flag in chosen | {"tracks"})
        constants = {"OP": op, "FLAGS": flags, "STORAGE": STORAGE[DTYPES[dtype]], "BLOCK": 512} | computed
        yield name, compiled(step_kernels.step, {}, constants, plan.WARPS[DTYPES[dtype]]), True
        if op in (ADAM, STATISTICS):
            yield f"{name}, finished", compiled(finish_kernels.finish, {}, constants, 4), False
    yield "channels", compiled(finish_kernels.fold_channels, {"sums": "*fp32"}, {"BLOCK": 256}, 4), False


def main() -> None:
    for dtype in sys.argv[1:]:
        for name, kernel, wide in all_of(dtype):
            assert len(kernel.asm["cubin"]) > 0
            ptx = kernel.asm["ptx"]
            # Multiplications and additions are rounded one by one.
            assert "fma.rn.f32" not in ptx, name
            assert not wide or re.search(r"ld\.global\.v(4\.b32|2\.b64)", ptx), name


if __name__ == "__main__":
    main()
