"""Batch normalisation with its activation, in plain torch: the specification of the fused kernels.

``x`` is ``[N, C, ...]``. With one mean and variance per channel, rounded to the compute type (float64
for float64, else float32), and everything per channel computed in float64 and then rounded:

    scale = gamma / sqrt(var + eps);  shift = beta - mean * scale
    z = x * scale + shift (+ residual);  y = activation(z)

The backward pass recomputes ``z`` by the same expression, so that it decides as the forward pass did
where ``z`` is within rounding of a kink. Nothing but ``x``, the residual, mean and variance is kept.
Formulas: Ioffe and Szegedy 2015, "Batch Normalization"; derivatives of the activations as in torch
(aten/native/cpu/Activation.cpp).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsekern.kernels.activations import ACTIVATIONS as ACTIVATIONS
from sparsekern.kernels.activations import compute_dtype as compute_dtype
from sparsekern.kernels.counts import ChannelCounts


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
    """``(y, mean, var)``: the output, and what the channels were normalised by.

    Args:
        x: ``[N, C, ...]``; float32, float64, bfloat16 or float16.
        residual: like ``x``, added before the activation.
        weight, bias: gamma and beta ``[C]``; None for 1 and 0.
        running_mean, running_var: ``[C]``; used unless ``training``.
        mask: bool ``[C]``; where True the channel's ``x`` is not read and ``z`` is the residual, or 0.
            Their mean and variance are the running ones, in training the variance without its correction
            for the number of elements, so that an update of the running ones leaves them as they are.
        momentum: in training, the share of the batch's statistics that goes into the running ones, in place:
            as in torch, with the variance of ``elements - 1``.
        activation: one of :data:`ACTIVATIONS`.
        training: normalise by the batch's own mean and (biased) variance.

    Returns:
        ``y`` of the shape, dtype and memory format of ``x``; ``mean`` and ``var`` ``[C]``, float64 for
        float64, else float32.
    """
    dtype = compute_dtype(x)
    values = x.to(dtype)
    mean, var = _initial(running_mean, running_var, x, dtype)
    if training:
        over = [d for d in range(x.dim()) if d != 1]
        batch_var, batch_mean = torch.var_mean(values.double(), over, correction=0)
        elements = x.numel() // x.shape[1]
        mean = _where(mask, mean, batch_mean.to(dtype))
        var = _where(mask, var * ((elements - 1) / elements), batch_var.to(dtype))
        if momentum and running_mean is not None and running_var is not None:
            track(running_mean, running_var, mean, var, elements, momentum)
    z = _normalised(values, residual, weight, bias, mean, var, mask, eps)
    return _activate(z, activation).to(x.dtype), mean, var


def track(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, elements: int, momentum: float
) -> None:
    """Blend the statistics of a batch of ``elements`` for each channel into the running ones, in place."""
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    unbiased = var * (elements / (elements - 1))
    running_var.lerp_(unbiased.to(running_var.dtype), momentum)


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
    """Gradients of ``x``, ``residual``, ``weight`` and ``bias``, and the counts on the way.

    Args:
        grad: the gradient of ``y``.
        mean, var: what :func:`norm_act_forward` returned.
        counts: updated when given.

    The other arguments are those of the forward pass. A masked channel gets zeros; its residual gets the
    gradient of its own activation.

    Returns:
        The first two like ``x`` (the second None without ``residual``), the others ``[C]`` in the
        compute type.
    """
    dtype = compute_dtype(x)
    values = x.to(dtype)
    z = _normalised(values, residual, weight, bias, mean, var, mask, eps)
    dz = _gradient(grad.to(dtype), z, activation)
    over = [d for d in range(x.dim()) if d != 1]
    elements = x.numel() // x.shape[1]
    centred = values - _spread(mean, x)
    live = torch.ones_like(mean, dtype=torch.bool) if mask is None else ~mask
    sums = [
        torch.where(live, part.double().sum(over), 0)
        for part in (dz, dz * centred, dz * dz, dz.abs() > _spread(_threshold(counts, mean), x))
    ]
    grad_x = _grad_of_input(dz, centred, weight, var, eps, sums, elements, training)
    grad_x = torch.where(_spread(live, x), grad_x, 0).to(x.dtype)
    grad_residual = None if residual is None else dz.to(x.dtype)
    if counts is not None:
        count(counts, sums[3], sums[2], weight, bias, live, elements)
    rstd = 1 / (var.double() + eps).sqrt()
    grad_weight = torch.where(live, sums[1] * rstd, 0)
    return grad_x, grad_residual, grad_weight.to(dtype), sums[0].to(dtype)


def count(
    counts: ChannelCounts,
    exceeding: Tensor,
    grad_sq: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    live: Tensor,
    elements: int,
) -> None:
    """Fold one pass into the means, and set the thresholds of the next.

    Args:
        exceeding: float64 ``[C]``; elements above their threshold.
        grad_sq: float64 ``[C]``; sums of the squared gradients.
        live: bool ``[C]``; not masked.
        elements: of a channel.
    """
    gamma_sq = 1.0 if weight is None else weight.double().square()
    beta_sq = 0.0 if bias is None else bias.double().square()
    norm_sq = torch.ones_like(grad_sq) * gamma_sq + beta_sq
    counted = live & grad_sq.isfinite() & norm_sq.isfinite()
    share = (exceeding / elements).float()
    decay = torch.tensor(counts.decay, dtype=torch.float32)
    blended = counts.activity * decay + share * torch.tensor(1 - counts.decay, dtype=torch.float32)
    counts.activity.copy_(torch.where(counted, blended, counts.activity))
    total = torch.where(counted, grad_sq * norm_sq, 0).sum()
    rms = (total / (counted.sum() * elements)).sqrt()
    threshold = torch.where(norm_sq == 0, torch.inf, counts.tau * rms / norm_sq.sqrt())
    counts.threshold.copy_(torch.where(counted, threshold.float(), counts.threshold))
    counts.updates.add_(1)


def _initial(
    running_mean: Tensor | None, running_var: Tensor | None, x: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Copies of the running mean and variance; 0 and 1 where there are none."""
    mean = x.new_zeros(x.shape[1], dtype=dtype) if running_mean is None else running_mean.to(dtype, copy=True)
    var = x.new_ones(x.shape[1], dtype=dtype) if running_var is None else running_var.to(dtype, copy=True)
    return mean, var


def _normalised(
    values: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None,
    eps: float,
) -> Tensor:
    scale = _scale(weight, var, eps)
    shift = -mean.double() * scale if bias is None else bias.double() - mean.double() * scale
    z = values * _spread(scale.to(values.dtype), values) + _spread(shift.to(values.dtype), values)
    if mask is not None:
        z = torch.where(_spread(mask, values), 0, z)
    return z if residual is None else z + residual.to(values.dtype)


def _scale(weight: Tensor | None, var: Tensor, eps: float) -> Tensor:
    """``gamma / sqrt(var + eps)``, float64."""
    rstd = 1 / (var.double() + eps).sqrt()
    return rstd if weight is None else weight.double() * rstd


def _grad_of_input(
    dz: Tensor,
    centred: Tensor,
    weight: Tensor | None,
    var: Tensor,
    eps: float,
    sums: list[Tensor],
    elements: int,
    training: bool,
) -> Tensor:
    """``scale * (dz - mean(dz) - (x - mean) * mean(dz * (x - mean)) / (var + eps))``; in evaluation the
    means are not of this batch, and do not depend on it."""
    scale = _scale(weight, var, eps)
    grad = dz * _spread(scale.to(dz.dtype), dz)
    if not training:
        return grad
    slope = -scale * (sums[1] / elements) / (var.double() + eps)
    offset = -scale * (sums[0] / elements)
    return grad + (centred * _spread(slope.to(dz.dtype), dz) + _spread(offset.to(dz.dtype), dz))


def _threshold(counts: ChannelCounts | None, mean: Tensor) -> Tensor:
    return torch.full_like(mean, math.inf) if counts is None else counts.threshold


def _spread(per_channel: Tensor, like: Tensor) -> Tensor:
    return per_channel.reshape([-1 if d == 1 else 1 for d in range(like.dim())])


def _where(mask: Tensor | None, masked: Tensor, other: Tensor) -> Tensor:
    return other if mask is None else torch.where(mask, masked, other)


def _activate(z: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return z.relu()
    if activation == "relu6":
        return z.clamp(0, 6)
    if activation == "hardswish":
        return z * (z + 3).clamp(0, 6) * (1 / 6)
    return z * torch.sigmoid(z) if activation == "silu" else z


def _gradient(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    """The gradient of ``z`` from that of ``activation(z)``."""
    if activation == "relu":
        return torch.where(z <= 0, 0, grad)
    if activation == "relu6":
        return torch.where((z <= 0) | (z >= 6), 0, grad)
    if activation == "hardswish":
        inside = torch.where(z < 3, grad * (z * (1 / 3) + 0.5), grad)
        return torch.where(z <= -3, 0, inside)
    if activation == "silu":
        sigmoid = torch.sigmoid(z)
        return grad * (sigmoid * (1 + z * (1 - sigmoid)))
    return grad
