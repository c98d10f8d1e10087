"""Native batch normalisation with its activation on the CPU: one call for each pass.

The kernels walk data that lies contiguous or channels-last, with vectors of the compute type. Native code
sees by itself whether a call has that; else it is converted here and given to it once more. float16 is
computed in float32, as the reference does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekern.kernels import native as _native
from sparsekern.kernels.backends.norm_layout import Layout, layout_of
from sparsekern.kernels.backends.reference.norm_act import ACTIVATIONS, compute_dtype
from sparsekern.kernels.counts import ChannelCounts
from sparsekern.kernels.native import pointers
from sparsekern.kernels.norm_checks import check_memory, named_counts

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}

_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}

_MISFIT = -1

_INPUTS = ("x", "residual", "weight", "bias", "mask")

_UNCOUNTED: tuple[Tensor | None, ...] = (None, None, None)


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
    """See :func:`sparsekern.kernels.backends.reference.norm_act.norm_act_forward`."""
    inputs = (x, residual, weight, bias, mask)
    y, mean, var = torch.empty_like(x), *_vectors(x)
    own = (running_mean, running_var, y, mean, var)
    numbers = (_NUMBERS[activation], training, eps, momentum, torch.get_num_threads())
    if _done(_C.norm_forward(inputs, own, *numbers), x):
        return y, mean, var
    written = {"running_mean": running_mean, "running_var": running_var} if momentum else {}
    check_memory(written, dict(zip(_INPUTS, inputs, strict=True)))
    data, layout, converted = _converted(inputs)
    y = torch.empty_like(data)
    running = (_vector(running_mean, data), _vector(running_var, data))
    _call_at(_C.norm_forward_at, layout, converted, (*running, y, mean, var), numbers)
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
    """See :func:`sparsekern.kernels.backends.reference.norm_act.norm_act_backward`."""
    inputs = (x, residual, weight, bias, mask)
    grad_x = torch.empty_like(x)
    grad_residual = None if residual is None else torch.empty_like(x)
    grad_weight, grad_bias = _vectors(x)
    tau, decay, arrays = 1.0, 0.0, _UNCOUNTED
    if counts is not None:
        tau, decay, arrays = counts.tau, counts.decay, (counts.threshold, counts.activity, counts.updates)
    numbers = (_NUMBERS[activation], training, eps, tau, decay, torch.get_num_threads())
    own = (grad, mean, var, grad_x, grad_residual, grad_weight, grad_bias, *arrays)
    if _done(_C.norm_backward(inputs, own, *numbers), x):
        return grad_x, grad_residual, grad_weight, grad_bias
    read = dict(zip(_INPUTS, inputs, strict=True)) | {"grad": grad, "mean": mean, "var": var}
    check_memory(named_counts(counts), read)
    data, layout, converted = _converted(inputs)
    grad_x = torch.empty_like(data)
    grad_residual = None if residual is None else torch.empty_like(data)
    given = (_like(grad, data), _vector(mean, data), _vector(var, data))
    kept = tuple(None if array is None else array.float().contiguous() for array in arrays)
    own = (*given, grad_x, grad_residual, grad_weight, grad_bias, *kept)
    _call_at(_C.norm_backward_at, layout, converted, own, numbers)
    _give_back(kept, arrays)
    if grad_residual is not None:
        grad_residual = _as(grad_residual, x)
    return _as(grad_x, x), grad_residual, grad_weight, grad_bias


def _done(code: int, x: Tensor) -> bool:
    """Whether the kernels have done their work; not when a tensor has to be converted first."""
    if code > 0:
        raise RuntimeError(f"the native kernels refused data of shape {list(x.shape)} (error {code})")
    return code != _MISFIT


def _call_at(
    function: Callable[..., int],
    layout: Layout,
    inputs: Sequence[Tensor | None],
    own: Sequence[Tensor | None],
    numbers: Sequence[float],
) -> None:
    """One native call. The tensors live until it returns: the kernels know addresses only."""
    x = inputs[0]
    assert x is not None
    addresses = pointers.of_optional(inputs), pointers.of_optional(own)
    _done(function(_DTYPES[x.dtype], layout[:3], *addresses, *numbers), x)


def _converted(inputs: Sequence[Tensor | None]) -> tuple[Tensor, Layout, tuple[Tensor | None, ...]]:
    """``x``, how it lies, and all inputs, in types and orders that the kernels know."""
    x, residual, weight, bias, mask = inputs
    assert x is not None
    data, layout = _walkable(x)
    others = (_like(residual, data), _vector(weight, data), _vector(bias, data), _dense(mask))
    return data, layout, (data, *others)


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


def _vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    one = torch.empty(x.shape[1], dtype=compute_dtype(x))
    return one, torch.empty_like(one)


_C: Any = _native.load()
