"""Compiles the kernels for a GPU, or counts the variants that layers need; no GPU is needed.

This is a script, because Triton compiles nothing in a process in which it interprets: ``python
compile_kernels.py bf16 fp32@80`` compiles for sm_90 and for sm_80, and ``python compile_kernels.py variants``
prints, for each kernel of the norms, how many variants the layers of :data:`LAYERS` need.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from sparsekern.kernels.backends.norm_layout import Layout
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


LAYERS = [
    (images, channels, inner)
    for images in (16, 7, 1)
    for channels in (64, 63, 60, 50, 48, 33)
    for inner in (1, 32 * 32, 16 * 16)
]
"""Batches, channels and pixels of layers, the last batch of an epoch and several shrinks included; inner 1
stands for channels_last."""


def compiled(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], warps: int, architecture: int
) -> Any:
    """``kernel`` compiled for an architecture, with all addresses aligned to sixteen bytes."""
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, ALWAYS.get(name, "i32")) for name in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")
    }
    used = {name: value for name, value in constants.items() if name in signature}
    source = ASTSource(fn=kernel, signature=signature, constexprs=used, attrs=aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={**OPTIONS, "num_warps": warps}
    )


def all_of(dtype: str, architecture: int) -> Iterator[tuple[str, Any, bool]]:
    """Every kernel: its name, the compiled kernel, and whether it must have accesses of sixteen bytes."""
    compute = "fp64" if dtype == "fp64" else "fp32"
    computed = {"COMPUTE": compute_type(DTYPES[dtype])}
    types = dict.fromkeys(TENSORS, f"*{dtype}") | dict.fromkeys(COMPUTED, f"*{compute}")
    for module, names in NORM.items():
        for name in names:
            kernel = getattr(module, name)
            yield (
                name,
                compiled(kernel, types, NORM_CONSTANTS | computed, norm_act.WARPS, architecture),
                False,
            )
    for name, (op, chosen) in STEPS.items():
        flags = sum(1 << i for i, flag in enumerate(FLAGS) if flag in chosen | {"tracks"})
        constants = {"OP": op, "FLAGS": flags, "STORAGE": STORAGE[DTYPES[dtype]], "BLOCK": 512} | computed
        warps = plan.WARPS[DTYPES[dtype]]
        yield name, compiled(step_kernels.step, {}, constants, warps, architecture), True
        if op in (ADAM, STATISTICS):
            yield f"{name}, finished", compiled(finish_kernels.finish, {}, constants, 4, architecture), False
    folded = compiled(finish_kernels.fold_channels, {"sums": "*fp32"}, {"BLOCK": 256}, 4, architecture)
    yield "channels", folded, False


def variants() -> Iterator[tuple[str, int]]:
    """For each kernel of the norms, and the means per channel: variants that :data:`LAYERS` need."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    kernels = [getattr(module, name) for module, names in NORM.items() for name in names]
    for kernel in [*kernels, finish_kernels.fold_channels]:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        found = set()
        for images, channels, inner in LAYERS:
            outer = images if inner > 1 else images * 1024
            cut = norm_act.cut_of(Layout(outer, channels, inner, torch.contiguous_format))
            of_layer = {
                "channels": channels,
                "outer": outer,
                "inner": inner,
                "tiles": cut.tiles,
                "pieces": cut.pieces,
                "elements": images * 1024,
                "CHANNELS": cut.tile_channels if "OUTER" in kernel.arg_names else 16,
                "OUTER": cut.tile_outer,
                "INNER": cut.tile_inner,
            }
            given = {name: value for name, value in of_layer.items() if name in kernel.arg_names}
            rest = {name: 1e-3 for name in kernel.arg_names if name not in given}
            _, specialization, _ = bind(**given, **rest)
            found.add(str(specialization))
        yield kernel.__name__, len(found)


def main() -> None:
    if sys.argv[1:] == ["variants"]:
        for name, number in variants():
            print(name, number)
        return
    for argument in sys.argv[1:]:
        dtype, _, architecture = argument.partition("@")
        for name, kernel, wide in all_of(dtype, int(architecture or 90)):
            assert len(kernel.asm["cubin"]) > 0
            ptx = kernel.asm["ptx"]
            # Multiplications and additions are rounded one by one.
            assert "fma.rn.f32" not in ptx, name
            assert not wide or re.search(r"ld\.global\.v(4\.b32|2\.b64)", ptx), name


if __name__ == "__main__":
    main()
