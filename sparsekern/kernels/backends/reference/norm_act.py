"""Batch normalisation with its activation, in plain torch: the specification of the fused kernels.

``x`` is ``[N, C, ...]``. Each channel has one mean and one variance, rounded to the compute type (float64
for float64, else float32). Per-channel values are computed in float64 and then rounded:

    scale = gamma / sqrt(var + eps);  shift = beta - mean * scale
    z = x * scale + shift (+ residual);  y = activation(z)

The backward pass recomputes ``z`` with the same expression, so both passes agree on which side of a kink of
the activation ``z`` is. Only ``x``, the residual, the mean and the variance are stored for it.
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
from sparsekern.kernels.options import Moments, NormInputs, NormOptions, Running


def norm_act_forward(
    inputs: NormInputs, running: Running, options: NormOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each channel, add the residual and apply the activation.

    A masked channel has its residual or 0 as ``z``, and the running mean and variance as its own. In training
    this variance is multiplied by ``(elements - 1) / elements``, so an update leaves the running variance
    unchanged. As in torch, the update of the running statistics uses the unbiased variance (divisor
    ``elements - 1``) and is in place.

    Args:
        inputs: the data, the affine parameters and the mask.
        running: the running statistics; used unless training. Written in training with a momentum.
        options: the options.

    Returns:
        ``(y, mean, var)``. ``y`` has the shape, dtype and memory format of ``x``. ``mean`` and ``var`` are
        the ``[C]`` statistics that ``x`` was normalised by: float64 for float64 ``x``, else float32.
    """
    x, mask = inputs.x, inputs.mask
    dtype = compute_dtype(x)
    values = x.to(dtype)
    mean, var = _initial(running, x, dtype)
    if options.training:
        over = [d for d in range(x.dim()) if d != 1]
        batch_var, batch_mean = torch.var_mean(values.double(), over, correction=0)
        elements = x.numel() // x.shape[1]
        mean = _where(mask, mean, batch_mean.to(dtype))
        var = _where(mask, var * ((elements - 1) / elements), batch_var.to(dtype))
        track(running, mean, var, elements, options.momentum)
    z = _normalised(values, inputs, mean, var, options.eps)
    return _activate(z, options.activation).to(x.dtype), mean, var


def track(running: Running, mean: Tensor, var: Tensor, elements: int, momentum: float) -> None:
    """Update the running statistics from those of a batch, in place; not without a momentum.

    Args:
        running: written.
        mean, var: ``[C]``; mean and biased variance of the batch.
        elements: number of elements per channel in the batch.
        momentum: weight of the batch.
    """
    if momentum and running.mean is not None and running.var is not None:
        running.mean.lerp_(mean.to(running.mean.dtype), momentum)
        unbiased = var * (elements / (elements - 1))
        running.var.lerp_(unbiased.to(running.var.dtype), momentum)


def norm_act_backward(
    grad: Tensor, inputs: NormInputs, moments: Moments, options: NormOptions, counts: ChannelCounts | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of ``x``, ``residual``, ``weight`` and ``bias``; also updates ``counts``.

    Args:
        grad: the gradient of ``y``.
        inputs: those of the forward pass.
        moments: mean and variance, the results of :func:`norm_act_forward`.
        options: those of the forward pass; the momentum is not used.
        counts: the statistics of the channels, or None. Written.

    Returns:
        ``(grad_x, grad_residual, grad_weight, grad_bias)``. The first two are like ``x``, and the second is
        None without ``residual``. The last two are ``[C]`` in the compute type. The gradients of a masked
        channel are 0. Its residual gets the gradient of the activation.
    """
    x, (mean, var), eps = inputs.x, moments, options.eps
    dtype = compute_dtype(x)
    values = x.to(dtype)
    z = _normalised(values, inputs, mean, var, eps)
    dz = _gradient(grad.to(dtype), z, options.activation)
    over = [d for d in range(x.dim()) if d != 1]
    elements = x.numel() // x.shape[1]
    centred = values - _spread(mean, x)
    live = torch.ones_like(mean, dtype=torch.bool) if inputs.mask is None else ~inputs.mask
    sums = [
        torch.where(live, part.double().sum(over), 0)
        for part in (dz, dz * centred, dz * dz, dz.abs() > _spread(_threshold(counts, mean), x))
    ]
    grad_x = _grad_of_input(dz, centred, _scale(inputs.weight, var, eps), var, sums, elements, options)
    grad_x = torch.where(_spread(live, x), grad_x, 0).to(x.dtype)
    grad_residual = None if inputs.residual is None else dz.to(x.dtype)
    if counts is not None:
        count(counts, sums[3], sums[2], inputs, live, elements)
    rstd = 1 / (var.double() + eps).sqrt()
    grad_weight = torch.where(live, sums[1] * rstd, 0)
    return grad_x, grad_residual, grad_weight.to(dtype), sums[0].to(dtype)


def count(
    counts: ChannelCounts,
    exceeding: Tensor,
    grad_sq: Tensor,
    inputs: NormInputs,
    live: Tensor,
    elements: int,
) -> None:
    """Update the means of ``counts`` with one pass, and set the thresholds of the next pass.

    Args:
        counts: the statistics of the channels. Written.
        exceeding: float64 ``[C]``; number of elements above their threshold.
        grad_sq: float64 ``[C]``; sums of the squared gradients.
        inputs: those of the pass.
        live: bool ``[C]``; True for channels that are not masked.
        elements: number of elements per channel.
    """
    gamma_sq = 1.0 if inputs.weight is None else inputs.weight.double().square()
    beta_sq = 0.0 if inputs.bias is None else inputs.bias.double().square()
    norm_sq = torch.ones_like(grad_sq) * gamma_sq + beta_sq
    counted = live & grad_sq.isfinite() & norm_sq.isfinite()
    counted_share = (exceeding / elements).float()
    decay, share = (
        torch.tensor(number, dtype=torch.float32, device="cpu") for number in (counts.decay, 1 - counts.decay)
    )
    blended = counts.activity * decay + counted_share * share
    counts.activity.copy_(torch.where(counted, blended, counts.activity))
    total = torch.where(counted, grad_sq * norm_sq, 0).sum()
    rms = (total / (counted.sum() * elements)).sqrt()
    threshold = torch.where(norm_sq == 0, torch.inf, counts.tau * rms / norm_sq.sqrt())
    counts.threshold.copy_(torch.where(counted, threshold.float(), counts.threshold))
    counts.updates.add_(1)


def _initial(running: Running, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Copies of the running mean and variance in ``dtype``; 0 and 1 for None."""
    zeros, ones = (make(x.shape[1], dtype=dtype) for make in (x.new_zeros, x.new_ones))
    mean = zeros if running.mean is None else running.mean.to(dtype, copy=True)
    var = ones if running.var is None else running.var.to(dtype, copy=True)
    return mean, var


def _normalised(values: Tensor, inputs: NormInputs, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """``z`` of the module's formulas, from ``x`` in the compute type."""
    bias, mask, residual = inputs.bias, inputs.mask, inputs.residual
    scale = _scale(inputs.weight, var, eps)
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
    scale: Tensor,
    var: Tensor,
    sums: list[Tensor],
    elements: int,
    options: NormOptions,
) -> Tensor:
    """Gradient of ``x``: ``scale * (dz - mean(dz) - (x - mean) * mean(dz * (x - mean)) / (var + eps))``.

    In evaluation it is ``scale * dz``, because the statistics do not depend on the batch.
    """
    grad = dz * _spread(scale.to(dz.dtype), dz)
    if not options.training:
        return grad
    slope = -scale * (sums[1] / elements) / (var.double() + options.eps)
    offset = -scale * (sums[0] / elements)
    return grad + (centred * _spread(slope.to(dz.dtype), dz) + _spread(offset.to(dz.dtype), dz))


def _threshold(counts: ChannelCounts | None, mean: Tensor) -> Tensor:
    return torch.full_like(mean, math.inf) if counts is None else counts.threshold


def _spread(per_channel: Tensor, like: Tensor) -> Tensor:
    """Values ``[C]`` in a shape that broadcasts over ``like`` ``[N, C, ...]``."""
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
    """Gradient of ``z``, from ``grad``, the gradient of ``activation(z)``."""
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
