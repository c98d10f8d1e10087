"""Checks of the arguments of a normalisation with its activation.

Each call runs :func:`check`, which is fast for valid arguments. :func:`check_memory` finds tensors that share
memory. It runs where native code does not compare the addresses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sparsekern.kernels import memory as _memory
from sparsekern.kernels.activations import ACTIVATIONS, compute_dtype
from sparsekern.kernels.checks import DTYPES, count, means, number, own_memory, whole
from sparsekern.kernels.counts import ChannelCounts
from sparsekern.kernels.options import Moments, NormInputs, NormOptions, Running

_INF = float("inf")


def check(inputs: NormInputs, running: Running, options: NormOptions, counts: ChannelCounts | None) -> None:
    """Check that the arguments of ``norm_act`` match each other.

    Raises:
        TypeError, ValueError: an argument does not match; the message names it.
    """
    x, residual, weight, bias, mask = inputs
    running_mean, running_var = running
    activation, training, eps, momentum = options
    check_activation(activation)
    if not (0 <= eps < _INF and -_INF < momentum < _INF):
        number("eps", eps, 0, _INF, open_high=True)
        number("momentum", momentum, -_INF, _INF, open_low=True, open_high=True)
    if x.layout is not torch.strided or x.dtype not in DTYPES or x.dim() < 2 or x.numel() == 0:
        kind = "a nested tensor" if x.is_nested else f"{x.dtype} {list(x.shape)}{_layout(x)}"
        raise ValueError(f"x: got {kind}, expected floating-point [N, C, ...] with elements")
    if residual is not None and _kind(residual) != _kind(x):
        raise ValueError(f"residual: got {_described(residual)}, expected {_described(x)} as x")
    vectors = (weight, bias, running_mean, running_var)
    shape, device = x.shape[1:2], x.device
    for v in vectors:
        if v is not None and (
            v.shape != shape or v.device != device or v.dtype not in DTYPES or v.layout is not torch.strided
        ):
            _refuse(x, zip(("weight", "bias", "running_mean", "running_var"), vectors, strict=True))
    if mask is not None:
        _check_mask(mask, x)
    if counts is not None:
        check_counts(counts, x)
    if training and x.numel() == x.shape[1]:
        raise ValueError(f"x: got {list(x.shape)}, expected more than 1 value per channel when training")
    if not training and (running_mean is None or running_var is None):
        raise ValueError("running_mean, running_var: got None, expected both where training is not set")
    if training and momentum:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean, running_var: got None, expected both where momentum is not 0")
        if not (running_mean.is_contiguous() and running_var.is_contiguous()):
            own_memory("running_mean", running_mean)
            own_memory("running_var", running_var)


def check_forward_op(
    inputs: NormInputs,
    running: Running,
    options: NormOptions,
    counts: Sequence[Tensor],
    tau: float,
    decay: float,
) -> None:
    """Check the arguments of the op ``norm_act``, which writes to none of them.

    Raises:
        TypeError, ValueError: an argument does not match; the message names it.
    """
    named = inputs._asdict() | {"running_mean": running.mean, "running_var": running.var}
    _check_given(named, ("x",))
    found = _counts_of(counts, tau, decay)
    check(inputs, running, options, found)
    check_memory({}, named | named_counts(found))


def check_backward_op(
    grad: Tensor,
    inputs: NormInputs,
    moments: Moments,
    options: NormOptions,
    counts: Sequence[Tensor],
    tau: float,
    decay: float,
) -> ChannelCounts | None:
    """Check the arguments of the op ``norm_act_backward``, which writes only to the counts.

    Returns:
        The counts; None without counts.

    Raises:
        TypeError, ValueError: an argument does not match; the message names it.
    """
    named = {"grad": grad} | inputs._asdict() | moments._asdict()
    _check_given(named, ("grad", "x", "mean", "var"))
    found = _counts_of(counts, tau, decay)
    check(inputs, Running(), options._replace(training=True, momentum=0.0), found)
    x = inputs.x
    if _kind(grad) != _kind(x):
        raise ValueError(f"grad: got {_described(grad)}, expected {_described(x)} as x")
    expected = (x.shape[1:2], compute_dtype(x), x.device, torch.strided)
    for name, vector in moments._asdict().items():
        if _kind(vector) != expected:
            raise ValueError(
                f"{name}: got {_described(vector)}, expected {expected[1]} [{x.shape[1]}] on {x.device}, as "
                f"norm_act returned it"
            )
    check_memory(named_counts(found), named)
    return found


def check_memory(written: Mapping[str, Tensor | None], read: Mapping[str, Tensor | None]) -> None:
    """Check that each storage holds its tensor, and that written tensors share memory with no other tensor.

    Args:
        written, read: tensors that the call writes or only reads, keyed by the name of the argument.

    Raises:
        ValueError: a tensor is not whole or shares written memory; the message names it.
    """
    given = {name: [tensor] for name, tensor in written.items() if tensor is not None}
    others = {name: [tensor] for name, tensor in read.items() if tensor is not None}
    for name, (tensor,) in (given | others).items():
        whole(name, tensor)
    for name, (tensor,) in given.items():
        own_memory(name, tensor)
    _memory.check_disjoint(given, others)


def named_counts(counts: ChannelCounts | None) -> dict[str, Tensor]:
    """The arrays of the counts, keyed by their names in error messages; empty for None."""
    if counts is None:
        return {}
    return {f"counts.{name}": getattr(counts, name) for name in ("threshold", "activity", "updates")}


def _check_given(tensors: Mapping[str, Tensor | None], needed: Sequence[str]) -> None:
    """Check that operands of an op have sizes: the dispatcher takes None and nested tensors for any tensor.

    Args:
        tensors: the operands by name.
        needed: names of the operands that may not be None.

    Raises:
        TypeError: an operand is missing or a nested tensor.
    """
    for name, tensor in tensors.items():
        if tensor is None and name in needed:
            raise TypeError(f"{name}: got None, expected a tensor")
        if tensor is not None and tensor.is_nested:
            raise TypeError(f"{name}: got a nested tensor, expected a dense one")


def _counts_of(arrays: Sequence[Tensor], tau: float, decay: float) -> ChannelCounts | None:
    """The counts from the list of arrays that an op takes; None for an empty list.

    Raises:
        TypeError, ValueError: ``tau`` or ``decay`` is out of range, or the number of arrays is not 3.
    """
    means(tau, decay)
    if not arrays:
        return None
    count("counts", arrays, ("threshold", "activity", "updates"))
    return ChannelCounts.of(arrays, tau, decay)


def _check_mask(mask: Tensor, x: Tensor) -> None:
    """Check that ``mask`` is bool ``[C]`` on the device of ``x``."""
    if mask.shape != x.shape[1:2] or mask.device != x.device or mask.layout is not torch.strided:
        _refuse(x, [("mask", mask)])
    if mask.dtype is not torch.bool:
        raise ValueError(f"mask: got {mask.dtype}, expected torch.bool")


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device, torch.layout]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}{_layout(tensor)}"


def _layout(tensor: Tensor) -> str:
    return "" if tensor.layout is torch.strided else f" ({tensor.layout})"


def check_counts(counts: ChannelCounts, x: Tensor) -> None:
    """Check that the arrays of ``counts`` are float32, fit the channels of ``x`` and can be written.

    Raises:
        ValueError: an array does not match.
    """
    per_channel = (x.shape[1:2], torch.float32, x.device, torch.strided)
    single = (torch.Size([1]), *per_channel[1:])
    for name, expected in (("threshold", per_channel), ("activity", per_channel), ("updates", single)):
        array = getattr(counts, name)
        if _kind(array) != expected:
            raise ValueError(
                f"counts.{name}: got {_described(array)}, expected torch.float32 {list(expected[0])} on "
                f"{x.device}"
            )
        if not array.is_contiguous():
            own_memory(f"counts.{name}", array)


def _refuse(x: Tensor, vectors: Iterable[tuple[str, Tensor | None]]) -> None:
    """Raise the error for the first vector that does not match the channels of ``x``.

    Raises:
        ValueError: a vector has another shape, device, layout or kind of dtype.
    """
    for name, vector in vectors:
        if vector is None:
            continue
        fits = vector.shape == x.shape[1:2] and vector.device == x.device
        fits = fits and vector.layout is torch.strided
        if not (fits and (vector.dtype in DTYPES or name == "mask")):
            kind = "bool" if name == "mask" else "floating-point"
            raise ValueError(
                f"{name}: got {_described(vector)}, expected {kind} [{x.shape[1]}] on {x.device}, "
                f"the channels of x"
            )


def check_activation(activation: str) -> None:
    """Check that ``activation`` is one of :data:`ACTIVATIONS`.

    Raises:
        ValueError: the activation is unknown.
    """
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation: got {activation!r}, expected one of {known}")
