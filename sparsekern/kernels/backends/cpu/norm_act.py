"""Native batch normalisation with its activation on the CPU: one call for each pass.

The kernels take contiguous or channels-last data, and per-channel vectors in the compute type. Native code
checks this at each call. If it does not hold, Python converts the tensors and calls native code again.
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
from sparsekern.kernels.options import Moments, NormInputs, NormOptions, Running

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}

_MISFIT = -1

_UNCOUNTED: tuple[Tensor | None, ...] = (None, None, None)


def norm_act_forward(
    inputs: NormInputs, running: Running, options: NormOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`sparsekern.kernels.backends.reference.norm_act.norm_act_forward`."""
    activation, training, eps, momentum = options
    x = inputs[0]
    y, mean, var = torch.empty_like(x), *_vectors(x)
    numbers = (_NUMBERS[activation], training, eps, momentum, torch.get_num_threads())
    if _done(_C.norm_forward(inputs, (*running, y, mean, var), *numbers), x):
        return y, mean, var
    written = {"running_mean": running.mean, "running_var": running.var} if momentum else {}
    check_memory(written, inputs._asdict())
    data, layout, converted = _converted(inputs)
    y = torch.empty_like(data)
    used = tuple(_vector(array, data) for array in running)
    _call_at(_C.norm_forward_at, layout, converted, (*used, y, mean, var), numbers)
    if momentum:
        _give_back(used, running)
    return layout.returned(y, x), mean, var


def norm_act_backward(
    grad: Tensor, inputs: NormInputs, moments: Moments, options: NormOptions, counts: ChannelCounts | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """See :func:`sparsekern.kernels.backends.reference.norm_act.norm_act_backward`."""
    x, residual = inputs[:2]
    assert x is not None
    grad_x = torch.empty_like(x)
    grad_residual = None if residual is None else torch.empty_like(x)
    grad_weight, grad_bias = _vectors(x)
    tau, decay, arrays = 1.0, 0.0, _UNCOUNTED
    if counts is not None:
        tau, decay, arrays = counts.tau, counts.decay, (counts.threshold, counts.activity, counts.updates)
    activation, training, eps, _ = options
    numbers = (_NUMBERS[activation], training, eps, tau, decay, torch.get_num_threads())
    own = (grad, *moments, grad_x, grad_residual, grad_weight, grad_bias, *arrays)
    if _done(_C.norm_backward(inputs, own, *numbers), x):
        return grad_x, grad_residual, grad_weight, grad_bias
    check_memory(named_counts(counts), inputs._asdict() | {"grad": grad} | moments._asdict())
    data, layout, converted = _converted(inputs)
    grad_x = torch.empty_like(data)
    grad_residual = None if residual is None else torch.empty_like(data)
    given = (_like(grad, data), *(_vector(vector, data) for vector in moments))
    used = tuple(None if array is None else array.float().contiguous() for array in arrays)
    own = (*given, grad_x, grad_residual, grad_weight, grad_bias, *used)
    _call_at(_C.norm_backward_at, layout, converted, own, numbers)
    _give_back(used, arrays)
    return layout.returned_gradients((grad_x, grad_residual, grad_weight, grad_bias), x)


def _done(code: int, x: Tensor) -> bool:
    """Whether a native call succeeded; False when a tensor has to be converted first.

    Raises:
        RuntimeError: the kernels refused the data.
    """
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
    """Make one native call by addresses. The arguments keep the tensors alive until it returns."""
    x = inputs[0]
    assert x is not None
    addresses = pointers.optional_addresses(inputs), pointers.optional_addresses(own)
    _done(function(_DTYPES[x.dtype], layout[:3], *addresses, *numbers), x)


def _converted(inputs: NormInputs) -> tuple[Tensor, Layout, tuple[Tensor | None, ...]]:
    """``x``, its layout, and all inputs (``x`` first), in dtypes and memory orders of the kernels."""
    x, residual, weight, bias, mask = inputs
    layout = layout_of(x)
    data = layout.dense(x)
    others = (_like(residual, data), _vector(weight, data), _vector(bias, data), _dense(mask))
    return data, layout, (data, *others)


def _like(tensor: Tensor | None, data: Tensor) -> Tensor | None:
    """``tensor`` in the dtype and memory order of ``data``."""
    if tensor is None or (tensor.dtype is data.dtype and tensor.stride() == data.stride()):
        return tensor
    return torch.empty_like(data).copy_(tensor)


def _vector(tensor: Tensor | None, data: Tensor) -> Tensor | None:
    """``tensor``, contiguous and in the compute type; a copy only where it is not."""
    dtype = compute_dtype(data)
    if tensor is None or (tensor.dtype is dtype and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).contiguous()


def _give_back(used: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
    """Copy the results from converted copies back to the original tensors."""
    for copy, tensor in zip(used, given, strict=True):
        if copy is not tensor and copy is not None and tensor is not None:
            tensor.copy_(copy)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two uninitialized vectors ``[C]`` in the compute type."""
    one = torch.empty(x.shape[1], dtype=compute_dtype(x), device="cpu")
    return one, torch.empty_like(one)


_C: Any = _native.load()
