"""Native batch normalisation with its activation on the CPU: one call for each pass.

The kernels walk data that lies contiguous or channels-last; other data is copied. float16 is computed in
float32, as the reference does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekern import _native, _pointers
from sparsekern._counts import ChannelCounts
from sparsekern.backends._norm_layout import Layout, layout_of
from sparsekern.backends.reference_norm import ACTIVATIONS, compute_dtype

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}

_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


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
    """See :func:`sparsekern.backends.reference_norm.norm_act_forward`."""
    data, layout = _walkable(x)
    y = torch.empty_like(data)
    mean, var = _vectors(data)
    running = [_vector(running_mean, data), _vector(running_var, data)]
    inputs = [data, _like(residual, data), _vector(weight, data), _vector(bias, data), _dense(mask)]
    _call(_C.norm_forward, layout, activation, inputs, [*running, y, mean, var], training, eps, momentum)
    if momentum:
        _give_back(running, (running_mean, running_var))
    return _as(y, x), mean, var


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
    """See :func:`sparsekern.backends.reference_norm.norm_act_backward`."""
    data, layout = _walkable(x)
    grad_x = torch.empty_like(data)
    grad_residual = None if residual is None else torch.empty_like(data)
    grad_weight, grad_bias = _vectors(data)
    inputs = [data, _like(residual, data), _vector(weight, data), _vector(bias, data), _dense(mask)]
    others = [_like(grad, data), _dense(mean), _dense(var), grad_x, grad_residual, grad_weight, grad_bias]
    others += [None, None, None] if counts is None else counts.arrays
    tau, decay = (1.0, 0.0) if counts is None else (counts.tau, counts.decay)
    _call(_C.norm_backward, layout, activation, inputs, others, training, eps, tau, decay)
    if grad_residual is not None:
        grad_residual = _as(grad_residual, x)
    return _as(grad_x, x), grad_residual, grad_weight, grad_bias


def _call(
    function: Callable[..., int],
    layout: Layout,
    activation: str,
    inputs: Sequence[Tensor | None],
    others: Sequence[Tensor | None],
    *numbers: float,
) -> None:
    """One native call. The tensors live until it returns: the kernels know addresses only."""
    x = inputs[0]
    assert x is not None
    code = function(
        _DTYPES[x.dtype],
        _NUMBERS[activation],
        layout[:3],
        _pointers.of_optional(inputs),
        _pointers.of_optional(others),
        *numbers,
        torch.get_num_threads(),
    )
    if code != 0:
        raise RuntimeError(f"the native kernels refused data of shape {list(x.shape)} (error {code})")


def _walkable(x: Tensor) -> tuple[Tensor, Layout]:
    """``x`` in a type and memory order that the kernels know, and that order."""
    if x.dtype is torch.float16:
        x = x.float()
    layout = layout_of(x)
    return layout.dense(x), layout


def _like(tensor: Tensor | None, data: Tensor) -> Tensor | None:
    """``tensor`` in the type and memory order of ``data``."""
    if tensor is None or (tensor.dtype is data.dtype and tensor.stride() == data.stride()):
        return tensor
    return torch.empty_like(data).copy_(tensor)


def _vector(tensor: Tensor | None, data: Tensor) -> Tensor | None:
    """``tensor`` in the compute type and contiguous, itself where it is."""
    dtype = compute_dtype(data)
    if tensor is None or (tensor.dtype is dtype and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).contiguous()


def _give_back(used: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
    """What was written to copies, to what they are copies of."""
    for copy, tensor in zip(used, given, strict=True):
        if copy is not tensor and copy is not None and tensor is not None:
            tensor.copy_(copy)


def _as(result: Tensor, x: Tensor) -> Tensor:
    return result if result.dtype is x.dtype else result.to(x.dtype)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _vectors(data: Tensor) -> tuple[Tensor, Tensor]:
    dtype, channels = compute_dtype(data), data.shape[1]
    return torch.empty(channels, dtype=dtype), torch.empty(channels, dtype=dtype)


_C: Any = _native.load()
