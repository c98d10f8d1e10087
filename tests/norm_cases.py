"""Normalisations with their activation, and the comparison of a backend with the reference."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekern import _norm_ops
from sparsekern._counts import ChannelCounts
from sparsekern.backends import reference_norm
from sparsekern.backends.reference_norm import ACTIVATIONS as ACTIVATIONS
from sparsekern.nn.norm_act import NormAct2d

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EPS = 1e-5


@dataclass
class Case:
    """The operands of a normalisation."""

    x: Tensor
    residual: Tensor | None
    grad: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    mask: Tensor | None
    counts: ChannelCounts

    def forward(self) -> tuple[Tensor | None, ...]:
        affine = self.weight, self.bias
        return self.x, self.residual, *affine, self.running_mean, self.running_var, self.mask

    def backward(self, mean: Tensor, var: Tensor) -> tuple[Tensor | None, ...]:
        return self.grad, self.x, self.residual, self.weight, self.bias, mean, var, self.mask


def _laid_out(values: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return values.contiguous(memory_format=formats[values.dim()])
    if layout == "permuted":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "not aligned":
        memory = torch.empty(values.numel() + 1, dtype=values.dtype)
        return memory[1:].view(values.shape).copy_(values)
    return values


def case(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    *,
    residual: bool,
    masked: bool,
    affine: bool = True,
) -> Case:
    """The same for the same arguments; of every other one the same values, rounded and laid out."""
    generator = torch.Generator().manual_seed(sum(shape))

    def values(*of: int) -> Tensor:
        return torch.randn(of, generator=generator)

    channels = shape[1]
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    vectors = [values(channels).to(compute) for _ in range(3)]
    x = values(*shape) * 3 + vectors[0].reshape(-1, *[1] * (len(shape) - 2))
    mask = None
    if masked:
        mask = torch.rand(channels, generator=generator) < 0.3
        mask[0], mask[-1] = True, False
    counts = ChannelCounts.zeros(channels)
    counts.threshold.copy_(values(channels).abs())
    counts.activity.copy_(values(channels).sigmoid())
    return Case(
        x=_laid_out(x.to(dtype), layout),
        residual=_laid_out(values(*shape).to(dtype), layout) if residual else None,
        grad=_laid_out(values(*shape).to(dtype), layout),
        weight=vectors[1] if affine else None,
        bias=vectors[2] if affine else None,
        running_mean=values(channels).to(compute),
        running_var=values(channels).to(compute).square() + 0.1,
        mask=mask,
        counts=counts,
    )


def _near(name: str, got: Tensor, want: Tensor, allowed: Tensor | float) -> None:
    """Equal within ``allowed`` in every element, with the same shape, dtype and strides."""
    assert got.shape == want.shape and got.dtype == want.dtype, name
    assert got.numel() == 1 or got.stride() == want.stride(), f"{name}: {got.stride()}, {want.stride()}"
    mine, theirs = got.double(), want.double()
    same = (mine == theirs) | (mine.isnan() & theirs.isnan()) | ((mine - theirs).abs() <= allowed)
    if not bool(same.all()):
        at = tuple((~same).nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int((~same).sum())} of {same.numel()} differ, the first at {at}: "
            f"got {mine[at].item()!r}, want {theirs[at].item()!r}"
        )


def _compute_eps(of: Tensor) -> float:
    return torch.finfo(reference_norm.compute_dtype(of)).eps


def assert_forward(
    backend: Any, given: Case, activation: str, training: bool, conversion: float = 0.0
) -> None:
    """Mean and variance are near; the output is what the reference makes of them, to the last rounding.

    Args:
        conversion: units in the last place by which a conversion to the dtype may be off.
    """
    options: dict[str, Any] = {"activation": activation, "training": training, "eps": EPS}
    _, want_mean, want_var = reference_norm.norm_act_forward(*given.forward(), **options)  # type: ignore[arg-type]
    y, mean, var = backend.norm_act_forward(*given.forward(), **options)
    eps = _compute_eps(given.x)
    # A variance is taken about a first guess at the mean, by which its rounding grows.
    elements = given.x.numel() / given.x.shape[1]
    roundings = 32 + elements**0.5 if training else 0.0
    _near("mean", mean, want_mean, roundings * eps * (want_mean.abs() + want_var.sqrt()).double())
    _near("var", var, want_var, roundings * eps * want_var.double())
    x, residual, weight, bias, _, _, mask = given.forward()
    options["training"] = False
    want, _, _ = reference_norm.norm_act_forward(x, residual, weight, bias, mean, var, mask, **options)  # type: ignore[arg-type]
    missed = _missed(given, activation)
    converted = conversion * torch.finfo(given.x.dtype).eps * want.double().abs()
    _near("y", y, want, missed * (want.double().abs() + _terms(given, mean, var)) + converted)


def _missed(given: Case, activation: str) -> float:
    """What an element may be off, relative to the terms it is made of: nothing but where an exponential
    misses the last bits (and then the rounding of the result), or torch's square root in float64 does."""
    if activation == "silu":
        return 16 * _compute_eps(given.x) + torch.finfo(given.x.dtype).eps
    return 8 * _compute_eps(given.x) if given.x.dtype is torch.float64 else 0.0


def _terms(given: Case, mean: Tensor, var: Tensor) -> Tensor:
    """The largest term of what is normalised, in float64."""
    scale = _scale(given, var)
    return (given.x.double().abs() + _spread(mean, given.x).abs()) * _spread(scale, given.x)


def _scale(given: Case, var: Tensor) -> Tensor:
    gamma = 1.0 if given.weight is None else given.weight.double().abs()
    return gamma / (var.double() + EPS).sqrt()


def assert_backward(
    backend: Any, given: Case, activation: str, training: bool, conversion: float = 0.0
) -> None:
    """Counted elements are the same, sums near, and gradients near by what sums may be off.

    Args:
        conversion: units in the last place by which a conversion to the dtype may be off.
    """
    options: dict[str, Any] = {"activation": activation, "training": training, "eps": EPS}
    _, mean, var = reference_norm.norm_act_forward(*given.forward(), **options)  # type: ignore[arg-type]
    mine, theirs = deepcopy(given.counts), deepcopy(given.counts)
    operands = given.backward(mean, var)
    want = reference_norm.norm_act_backward(*operands, **options, counts=theirs)  # type: ignore[arg-type]
    got = backend.norm_act_backward(*operands, **options, counts=mine)
    eps, of_dtype = _compute_eps(given.x), torch.finfo(given.x.dtype).eps
    over = [d for d in range(given.x.dim()) if d != 1]
    grad = given.grad.double().nan_to_num(0, 0, 0)
    normal = (given.x.double() - _spread(mean, given.x)) / _spread(var + EPS, given.x).sqrt()
    normal = normal.nan_to_num(0, 0, 0)
    # Sums of n terms in any order err by sqrt(n) / 2 roundings, derivatives exceed 1 by a tenth.
    roundings = 2 * eps * (4 + (given.x.numel() / given.x.shape[1]) ** 0.5)
    size, of_bias = (grad * normal).abs().sum(over), grad.abs().sum(over)
    _near("grad_weight", got[2], want[2], roundings * size)
    _near("grad_bias", got[3], want[3], roundings * of_bias)
    elements = given.x.numel() // given.x.shape[1]
    scale = _scale(given, var)
    terms = grad.abs() + (normal.abs() * _spread(size, grad) + _spread(of_bias, grad)) / elements
    allowed = roundings * _spread(scale, grad) * terms + of_dtype * want[0].double().abs().nan_to_num(0, 0, 0)
    if not training:
        allowed = _missed(given, activation) * _spread(scale, grad) * grad.abs()
    allowed = allowed + conversion * of_dtype * want[0].double().abs().nan_to_num(0, 0, 0)
    _near("grad_x", got[0], want[0], allowed)
    if given.residual is not None:
        assert got[1] is not None and want[1] is not None
        allowed = _missed(given, activation) * grad.abs() + conversion * of_dtype * want[1].double().abs()
        _near("grad_residual", got[1], want[1], allowed)
    else:
        assert got[1] is None
    _near("updates", mine.updates, theirs.updates, 0)
    # Three roundings to float32; where an exponential misses, an element may be counted or not.
    uncounted = 1.0 / elements if activation == "silu" else 0.0
    single = torch.finfo(torch.float32).eps
    _near("activity", mine.activity, theirs.activity, 3 * single + uncounted * 0.011)
    _near("threshold", mine.threshold, theirs.threshold, (single + roundings) * theirs.threshold.double())


def _spread(per_channel: Tensor, like: Tensor) -> Tensor:
    return per_channel.double().reshape([-1 if d == 1 else 1 for d in range(like.dim())])


def assert_trains(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module and the ops on this backend are near the module on the reference, step by step."""
    results = []
    for chosen in (reference_norm, backend):
        monkeypatch.setattr(_norm_ops, "choose", lambda device, chosen=chosen: chosen)
        torch.manual_seed(0)
        norm = NormAct2d(6, activation="hardswish")
        norm.mask = torch.arange(6) == 2
        norm.counts = ChannelCounts.zeros(6)
        x = torch.randn(4, 6, 5, 5, requires_grad=True)
        found: list[Tensor] = []
        for _ in range(3):
            norm.zero_grad()
            y = norm(x, x.flip(0))
            y.square().sum().backward()
            gradients = [x.grad, norm.weight.grad, norm.bias.grad]
            found += [y.detach(), *[g.clone() for g in gradients if g is not None]]
        found += [norm.running_mean, norm.running_var, *norm.counts.arrays, norm.eval()(x).detach()]
        results.append([tensor.clone() for tensor in found])
    for mine, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
