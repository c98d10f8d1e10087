"""Normalisation with its activation, native, for tensors on NVIDIA GPUs.

Compiled and tested in emulation, never run on a GPU. Forward: in training one pass for the mean and
variance of every channel, whose parts a small launch merges, and one that normalises; else the latter
alone. Backward: one pass for the sums of every channel, a small launch that merges them, one pass for the
gradients, and with counts a last small launch. Each pass reads its tensors once, sixteen bytes at a time.
Nothing is added atomically: the order depends on shapes alone. Scratch and results come from torch's
allocator, nothing waits for the device, and all of it can be captured in a graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sparsekern.kernels.backends.norm_layout import Layout, layout_of, vector
from sparsekern.kernels.backends.reference import norm_act as reference_norm
from sparsekern.kernels.counts import ChannelCounts
from sparsekern.kernels.native import cuda_library, pointers

_target = cuda_library.Target(cuda_library.load(), "cuda", cuda_library.DEVICE_TYPE)


def norm_act_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mask: Tensor | None,
    *,
    activation: str,
    training: bool,
    eps: float,
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`sparsekern.kernels.backends.reference.norm_act.norm_act_forward`.

    Raises:
        RuntimeError: the kernels could not be launched.
    """
    if not _fits(x):
        return reference_norm.norm_act_forward(
            x,
            residual,
            weight,
            bias,
            running_mean,
            running_var,
            mask,
            activation=activation,
            training=training,
            eps=eps,
            momentum=momentum,
        )
    layout, dtype = layout_of(x), reference_norm.compute_dtype(x)
    y = layout.empty(x)
    mean = torch.empty(layout.channels, dtype=dtype, device=x.device)
    var = torch.empty_like(mean)
    operands = {
        "x": layout.dense(x),
        "residual": None if residual is None else layout.dense(residual),
        "out": y,
        "weight": vector(weight, dtype),
        "bias": vector(bias, dtype),
        "running_mean": vector(running_mean, dtype),
        "running_var": vector(running_var, dtype),
        "mean": mean,
        "var": var,
        "mask": None if mask is None else mask.contiguous(),
        "scratch": _scratch(x, layout) if training else None,
    }
    call = _call(x, layout, operands, activation=activation, training=training, eps=eps)
    _run("forward", call, x)
    if training and momentum and running_mean is not None and running_var is not None:
        reference_norm.track(running_mean, running_var, mean, var, x.numel() // x.shape[1], momentum)
    return layout.returned(y, x), mean, var


def norm_act_backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None,
    *,
    activation: str,
    training: bool,
    eps: float,
    counts: ChannelCounts | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """See :func:`sparsekern.kernels.backends.reference.norm_act.norm_act_backward`.

    Raises:
        RuntimeError: the kernels could not be launched.
    """
    arrays = [] if counts is None else counts.arrays
    if not _fits(x) or not all(_is_written(array, x) for array in arrays):
        return reference_norm.norm_act_backward(
            grad,
            x,
            residual,
            weight,
            bias,
            mean,
            var,
            mask,
            activation=activation,
            training=training,
            eps=eps,
            counts=counts,
        )
    layout, dtype = layout_of(x), reference_norm.compute_dtype(x)
    grad_x = layout.empty(x)
    grad_residual = None if residual is None else layout.empty(x)
    grad_weight = torch.empty(layout.channels, dtype=dtype, device=x.device)
    grad_bias = torch.empty_like(grad_weight)
    operands = {
        "x": layout.dense(x),
        "residual": None if residual is None else layout.dense(residual),
        "grad": layout.dense(grad),
        "out": grad_x,
        "grad_residual": grad_residual,
        "weight": vector(weight, dtype),
        "bias": vector(bias, dtype),
        "mean": vector(mean, dtype),
        "var": vector(var, dtype),
        "mask": None if mask is None else mask.contiguous(),
        "grad_weight": grad_weight,
        "grad_bias": grad_bias,
        "scratch": _scratch(x, layout),
        **dict(zip(("threshold", "activity", "updates"), arrays, strict=False)),
    }
    options: dict[str, Any] = {} if counts is None else {"tau": counts.tau, "decay": counts.decay}
    call = _call(x, layout, operands, activation=activation, training=training, eps=eps, **options)
    _run("backward", call, x)
    if arrays:
        # Raw writes do not tell autograd of themselves.
        increment_version(arrays)
    return (
        layout.returned(grad_x, x),
        None if grad_residual is None else layout.returned(grad_residual, x),
        grad_weight,
        grad_bias,
    )


def _fits(x: Tensor) -> bool:
    return x.device.type == _target.device_type and x.dtype in cuda_library.DTYPES


def _is_written(array: Tensor, x: Tensor) -> bool:
    """Whether a field of ChannelCounts is what the kernels write."""
    return array.dtype is torch.float32 and array.is_contiguous() and array.device == x.device


def _scratch(x: Tensor, layout: Layout) -> Tensor:
    numbers = _target.library.sparsekern_cuda_norm_scratch(*layout[:3], x.element_size())
    return torch.empty(numbers, dtype=torch.float64, device=x.device)


def _call(
    x: Tensor, layout: Layout, operands: dict[str, Tensor | None], *, activation: str, **options: Any
) -> cuda_library.Norm:
    """What the library is called with; the caller holds ``operands`` until that is over."""
    addresses = {name: pointers.of_tensor(tensor) for name, tensor in operands.items() if tensor is not None}
    return cuda_library.Norm(
        **addresses,
        **options,
        stream=cuda_library.stream(x.device),
        outer=layout.outer,
        channels=layout.channels,
        inner=layout.inner,
        activation=reference_norm.ACTIVATIONS.index(activation),
        dtype=cuda_library.DTYPES[x.dtype],
        device=x.device.index or 0,
    )


def _run(direction: str, call: cuda_library.Norm, x: Tensor) -> None:
    code = getattr(_target.library, f"sparsekern_cuda_norm_{direction}")(call)
    cuda_library.check(_target.library, code, f"a normalisation of {list(x.shape)}")
