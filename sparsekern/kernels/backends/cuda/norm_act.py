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

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sparsekern.kernels.backends.norm_layout import Layout, layout_of, vector
from sparsekern.kernels.backends.reference import norm_act as reference_norm
from sparsekern.kernels.counts import ChannelCounts
from sparsekern.kernels.native import cuda_library, pointers
from sparsekern.kernels.options import Moments, NormInputs, NormOptions, Running

_target = cuda_library.Target(cuda_library.load(), "cuda", cuda_library.DEVICE_TYPE)


def norm_act_forward(
    inputs: NormInputs, running: Running, options: NormOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`sparsekern.kernels.backends.reference.norm_act.norm_act_forward`.

    Raises:
        RuntimeError: the kernels could not be launched.
    """
    x = inputs.x
    if not _fits(x):
        return reference_norm.norm_act_forward(inputs, running, options)
    layout, dtype = layout_of(x), reference_norm.compute_dtype(x)
    y, (mean, var) = layout.empty(x), layout.vectors(x)
    operands = layout.converted(inputs)._asdict() | {
        "out": y,
        "running_mean": vector(running.mean, dtype),
        "running_var": vector(running.var, dtype),
        "mean": mean,
        "var": var,
        "scratch": _scratch(x, layout) if options.training else None,
    }
    momentum = options.momentum if options.training else 0.0
    written = _written(running, operands) if momentum else []
    _run("forward", x, layout, operands, options, momentum=momentum if written else 0.0)
    if written:
        # Autograd does not see raw writes.
        increment_version(written)
    else:
        reference_norm.track(running, mean, var, x.numel() // x.shape[1], momentum)
    return layout.returned(y, x), mean, var


def norm_act_backward(
    grad: Tensor, inputs: NormInputs, moments: Moments, options: NormOptions, counts: ChannelCounts | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """See :func:`sparsekern.kernels.backends.reference.norm_act.norm_act_backward`.

    Raises:
        RuntimeError: the kernels could not be launched.
    """
    x = inputs.x
    arrays = [] if counts is None else counts.arrays
    if not _fits(x) or not all(_is_written(array, x) for array in arrays):
        return reference_norm.norm_act_backward(grad, inputs, moments, options, counts)
    layout, dtype = layout_of(x), reference_norm.compute_dtype(x)
    results = layout.gradients(inputs)
    operands = layout.converted(inputs)._asdict() | {
        "grad": layout.dense(grad),
        "mean": vector(moments.mean, dtype),
        "var": vector(moments.var, dtype),
        **dict(zip(("out", "grad_residual", "grad_weight", "grad_bias"), results, strict=True)),
        "scratch": _scratch(x, layout),
        **dict(zip(("threshold", "activity", "updates"), arrays, strict=False)),
    }
    means = {} if counts is None else {"tau": counts.tau, "decay": counts.decay}
    _run("backward", x, layout, operands, options, **means)
    if arrays:
        # Autograd does not see raw writes.
        increment_version(arrays)
    return layout.returned_gradients(results, x)


def _fits(x: Tensor) -> bool:
    """Whether the kernels take the device and dtype of ``x``."""
    return x.device.type == _target.device_type and x.dtype in cuda_library.DTYPES


def _written(running: Running, operands: dict[str, Tensor | None]) -> list[Tensor]:
    """The running statistics if the kernels can write to them: both exist, and none had to be converted."""
    pairs = zip(running, (operands["running_mean"], operands["running_var"]), strict=True)
    both = [own for own, given in pairs if own is not None and own is given]
    return both if len(both) == 2 else []


def _is_written(array: Tensor, x: Tensor) -> bool:
    """Whether the kernels can write to ``array``, a field of ChannelCounts."""
    return array.dtype is torch.float32 and array.is_contiguous() and array.device == x.device


def _scratch(x: Tensor, layout: Layout) -> Tensor:
    """Float64 scratch memory for one pass over ``x``."""
    numbers = _target.library.sparsekern_cuda_norm_scratch(*layout[:3], x.element_size())
    return torch.empty(numbers, dtype=torch.float64, device=x.device)


def _run(
    direction: str,
    x: Tensor,
    layout: Layout,
    operands: dict[str, Tensor | None],
    options: NormOptions,
    **means: float,
) -> None:
    """Make a library call.

    Args:
        direction: ``forward`` or ``backward``.
        x: the data.
        layout: the layout of ``x``.
        operands: the tensors, keyed by the fields of ``cuda_library.Norm``. They are kept alive meanwhile.
        options: the options.
        means: ``tau`` and ``decay`` of the counts, if there are any; ``momentum`` of the running statistics.

    Raises:
        RuntimeError: the kernels could not be launched.
    """
    call = _call(x, layout, operands, options, **means)
    code = getattr(_target.library, f"sparsekern_cuda_norm_{direction}")(call)
    cuda_library.check(_target.library, code, f"a normalisation of {list(x.shape)}")


def _call(
    x: Tensor, layout: Layout, operands: dict[str, Tensor | None], options: NormOptions, **means: float
) -> cuda_library.Norm:
    """The arguments of a library call. The caller keeps ``operands`` alive until the call returns."""
    addresses = {name: pointers.address_of(tensor) for name, tensor in operands.items() if tensor is not None}
    return cuda_library.Norm(
        **addresses,
        **means,
        eps=options.eps,
        training=options.training,
        stream=cuda_library.stream(x.device),
        outer=layout.outer,
        channels=layout.channels,
        inner=layout.inner,
        activation=reference_norm.ACTIVATIONS.index(options.activation),
        dtype=cuda_library.DTYPES[x.dtype],
        device=x.device.index or 0,
    )
