"""Checks of the arguments of a normalisation with its activation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sparsekern._checks import own_memory
from sparsekern._counts import ChannelCounts
from sparsekern.backends import reference_norm


def check(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mask: Tensor | None,
    counts: ChannelCounts | None,
    activation: str,
    training: bool,
    momentum: float,
) -> None:
    """The arguments of a normalisation, as of ``norm_act``, fit each other.

    On the way of every call, so it is short where they do.

    Raises:
        ValueError: one does not; names it.
    """
    check_activation(activation)
    if x.dim() < 2 or x.numel() == 0 or not x.is_floating_point():
        raise ValueError(
            f"x: got {x.dtype} {list(x.shape)}, expected floating-point [N, C, ...] with elements"
        )
    if residual is not None and _kind(residual) != _kind(x):
        raise ValueError(f"residual: got {_described(residual)}, expected {_described(x)} as x")
    vectors = (weight, bias, running_mean, running_var)
    shape, device = x.shape[1:2], x.device
    if any(
        v is not None and (v.shape != shape or v.device != device or not v.is_floating_point())
        for v in vectors
    ):
        _refuse(x, zip(("weight", "bias", "running_mean", "running_var"), vectors, strict=True))
    if mask is not None and (mask.shape != shape or mask.device != device):
        _refuse(x, [("mask", mask)])
    if mask is not None and mask.dtype is not torch.bool:
        raise ValueError(f"mask: got {mask.dtype}, expected torch.bool")
    if counts is not None:
        _check_counts(counts, x)
    if training and x.numel() == x.shape[1]:
        raise ValueError(f"x: got {list(x.shape)}, expected more than 1 value per channel when training")
    if not training and (running_mean is None or running_var is None):
        raise ValueError("running_mean, running_var: got None, expected both where training is not set")
    if training and momentum:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean, running_var: got None, expected both where momentum is not 0")
        if not (running_mean.is_contiguous() and running_var.is_contiguous()):
            own_memory("running_mean", [running_mean])
            own_memory("running_var", [running_var])


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device, torch.layout]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout


def _described(tensor: Tensor) -> str:
    layout = "" if tensor.layout is torch.strided else f" ({tensor.layout})"
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}{layout}"


def _check_counts(counts: ChannelCounts, x: Tensor) -> None:
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
            own_memory(f"counts.{name}", [array])


def _refuse(x: Tensor, vectors: Iterable[tuple[str, Tensor | None]]) -> None:
    """Raise a ValueError for the first of the vectors that has not one number for each channel of ``x``."""
    for name, vector in vectors:
        fits = vector is None or (vector.shape == x.shape[1:2] and vector.device == x.device)
        if vector is not None and not (fits and (vector.is_floating_point() or name == "mask")):
            kind = "bool" if name == "mask" else "floating-point"
            raise ValueError(
                f"{name}: got {_described(vector)}, expected {kind} [{x.shape[1]}] on {x.device}, "
                f"the channels of x"
            )


def check_activation(activation: str) -> None:
    """Raises ``ValueError`` for one that does not exist."""
    if activation not in reference_norm.ACTIVATIONS:
        known = ", ".join(reference_norm.ACTIVATIONS)
        raise ValueError(f"activation: got {activation!r}, expected one of {known}")
