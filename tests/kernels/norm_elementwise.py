"""Elementwise comparison of a backend's normalisations with the reference, with the tightest tolerances."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernels.tolerance import assert_elementwise
from torch import Tensor

from sparsekern.kernels import norm_ops
from sparsekern.kernels.backends import reference
from sparsekern.kernels.backends.reference import norm_act as reference_norm
from sparsekern.kernels.counts import ChannelCounts
from sparsekern.kernels.selfcheck.norms import NormProblem, laid_out, problem
from sparsekern.nn import NormAct2d

SINGLE = torch.finfo(torch.float32).eps


def assert_forward(backend: Any, given: NormProblem) -> None:
    """Mean and variance are near the reference's; the output is the reference's for the same two."""
    _, want_mean, want_var = given.forward(reference_norm)
    y, mean, var = given.forward(backend)
    eps = _compute_eps(given.x)
    # The variance is computed about an estimate of the mean; its rounding grows with the estimate's error.
    roundings = 32 + _elements(given) ** 0.5 if given.options["training"] else 0.0
    _near("mean", mean, want_mean, roundings * eps * (want_mean.abs() + want_var.sqrt()).double())
    _near("var", var, want_var, roundings * eps * want_var.double())
    want, _, _ = replace(given, running=(mean, var), options=given.options | {"training": False}).forward(
        reference_norm
    )
    sizes = _finite(want)
    # The largest term in the normalisation of an element.
    terms = (_finite(given.x) + _spread(mean.abs(), given.x)) * _spread(_scale(given, var), given.x)
    _near("y", y, want, _missed(given) * (sizes + terms))


def assert_backward(backend: Any, given: NormProblem) -> None:
    """Counts are equal, sums are near, and gradients differ by no more than the errors of the sums allow."""
    _, mean, var = given.forward(reference_norm)
    want, got = given.backward(reference_norm, mean, var), given.backward(backend, mean, var)
    dtype_eps, elements = torch.finfo(given.x.dtype).eps, _elements(given)
    over = [d for d in range(given.x.dim()) if d != 1]
    grad, scale = _finite(given.grad), _scale(given, var)
    centred = given.x.double() - _spread(mean, given.x)
    normal = _finite(centred / _spread(var.double() + given.options["eps"], given.x).sqrt())
    # A sum of n terms has an error of about sqrt(n) / 2 roundings in any order; derivatives add at most half.
    roundings = 2 * _compute_eps(given.x) * (4 + elements**0.5)
    dot, total = (grad * normal).sum(over), grad.sum(over)
    terms = grad + (normal * _spread(dot, grad) + _spread(total, grad)) / elements
    missed = roundings * terms if given.options["training"] else _missed(given) * grad
    rounded = dtype_eps if given.options["training"] else 0.0
    allowed = {
        "grad_x": _spread(scale, grad) * missed + rounded * _finite(want[0]),
        "grad_residual": _missed(given) * grad,
        "grad_weight": roundings * dot,
        "grad_bias": roundings * total,
    }
    if given.counts is not None:
        # Where an exponential is inexact, either decision about an element's count is allowed.
        uncounted = 1 / elements if given.options["activation"] == "silu" else 0.0
        allowed["threshold"] = (SINGLE + roundings) * _finite(want[4])
        allowed["activity"] = torch.tensor(3 * SINGLE + uncounted * (1 - given.counts.decay))
        allowed["updates"] = torch.tensor(0.0)
    for (name, size), mine, theirs in zip(allowed.items(), got, want, strict=True):
        assert (mine is None) == (theirs is None), name
        if mine is not None and theirs is not None:
            _near(name, mine, theirs, size)


def _near(name: str, got: Tensor, want: Tensor, allowed: Tensor) -> None:
    """Equal within ``allowed`` in every element, with the same shape, dtype and strides."""
    assert got.shape == want.shape and got.dtype == want.dtype, name
    assert got.numel() == 1 or got.stride() == want.stride(), f"{name}: {got.stride()}, {want.stride()}"
    assert_elementwise(name, got, want, allowed)


def _missed(given: NormProblem) -> float:
    """The error allowed in an element, relative to its terms.

    It is 0 except where an exponential is inexact in its last bits (then also the rounding of the result) or
    torch's float64 square root is."""
    if given.options["activation"] == "silu":
        return 16 * _compute_eps(given.x) + torch.finfo(given.x.dtype).eps
    return 8 * _compute_eps(given.x) if given.x.dtype is torch.float64 else 0.0


def _scale(given: NormProblem, var: Tensor) -> Tensor:
    gamma = 1.0 if given.weight is None else given.weight.double().abs()
    return gamma / (var.double() + given.options["eps"]).sqrt()


def _elements(given: NormProblem) -> int:
    return given.x.numel() // given.x.shape[1]


def _compute_eps(of: Tensor) -> float:
    return torch.finfo(reference_norm.compute_dtype(of)).eps


def _finite(values: Tensor | None) -> Tensor:
    """Absolute values; 0 for elements that are not finite."""
    return torch.zeros(()) if values is None else values.double().abs().nan_to_num(0, 0, 0)


def _spread(per_channel: Tensor, like: Tensor) -> Tensor:
    return per_channel.double().reshape([-1 if d == 1 else 1 for d in range(like.dim())])


def assert_far_from_zero(backend: Any, layout: str) -> None:
    """Mean and variance are accurate for numbers whose mean is far from 0 and whose first elements are 0."""
    given = laid_out(problem((6, 8, 33, 35), torch.float32, "contiguous"), layout)
    given.x.add_(1000)
    given.x[0, :, 0, 0] = 0
    _, mean, var = given.forward(backend)
    want_var, want_mean = torch.var_mean(given.x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), want_mean, rtol=1.2e-7, atol=0)
    torch.testing.assert_close(var.double(), want_var, rtol=1e-5, atol=0)


def assert_trains(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module on this backend is near the module on the reference, step by step."""
    results = []
    for chosen in (reference, backend):
        monkeypatch.setattr(norm_ops, "choose", lambda device, chosen=chosen: chosen)
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
        assert norm.running_mean is not None and norm.running_var is not None
        found += [norm.running_mean, norm.running_var, *norm.counts.arrays, norm.eval()(x).detach()]
        results.append(found)
    for mine, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
