"""Native normalisation with its activation for tensors on NVIDIA GPUs.

The kernels are compiled and tested in emulation, and have never run on a GPU.

The forward pass in training computes partial means and variances of the channels, merges them in a small
launch, and normalises. In evaluation it only normalises. The backward pass computes partial sums of the
channels, merges them in a small launch, and computes the gradients. With counts, another small launch
updates them. Each launch over the data reads its tensors once, 16 bytes at a time. The kernels use no atomic
additions, so the order of the sums depends only on the shapes. Scratch memory and results come from torch's
allocator. The host never waits for the device, and CUDA graphs can capture both passes.
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
        # Autograd does not see raw writes.
        increment_version(arrays)
    return (
        layout.returned(grad_x, x),
        None if grad_residual is None else layout.returned(grad_residual, x),
        grad_weight,
        grad_bias,
    )


def _fits(x: Tensor) -> bool:
    """Whether the kernels take the device and dtype of ``x``."""
    return x.device.type == _target.device_type and x.dtype in cuda_library.DTYPES


def _is_written(array: Tensor, x: Tensor) -> bool:
    """Whether the kernels can write to ``array``, a field of ChannelCounts."""
    return array.dtype is torch.float32 and array.is_contiguous() and array.device == x.device


def _scratch(x: Tensor, layout: Layout) -> Tensor:
    """Float64 scratch memory for one pass over ``x``."""
    numbers = _target.library.sparsekern_cuda_norm_scratch(*layout[:3], x.element_size())
    return torch.empty(numbers, dtype=torch.float64, device=x.device)


def _call(
    x: Tensor, layout: Layout, operands: dict[str, Tensor | None], *, activation: str, **options: Any
) -> cuda_library.Norm:
    """The arguments of a library call. The caller keeps ``operands`` alive until the call returns."""
    addresses = {name: pointers.address_of(tensor) for name, tensor in operands.items() if tensor is not None}
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
