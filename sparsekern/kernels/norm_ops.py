"""The ops of batch normalisation with its activation: schemas, fakes and autograd.

As in :mod:`sparsekern.kernels.ops`, calls under tracing use ``torch.ops.sparsekern``, and calls in eager mode
go directly to the backend. The dispatcher and its way back into Python take longer than a small layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsekern.kernels.backends import choose
from sparsekern.kernels.backends.reference import norm_act as reference_norm
from sparsekern.kernels.counts import ChannelCounts
from sparsekern.kernels.norm_checks import (
    check,
    check_backward_op,
    check_counts,
    check_forward_op,
    check_memory,
    named_counts,
)
from sparsekern.kernels.ops import traced

_LIBRARY = torch.library.Library("sparsekern", "FRAGMENT")

_OPTIONS = "*, str activation, bool training, float eps, float tau, float decay"
_AFFINE = "Tensor? weight, Tensor? bias"
_LIBRARY.define(
    f"norm_act(Tensor x, Tensor? residual, {_AFFINE}, Tensor? running_mean, Tensor? running_var, "
    f"Tensor? mask, Tensor[] counts, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    f"norm_act_backward(Tensor grad, Tensor x, Tensor? residual, {_AFFINE}, Tensor mean, Tensor var, "
    f"Tensor? mask, Tensor(a!)[] counts, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mask: Tensor | None,
    counts: ChannelCounts | None,
    *,
    activation: str,
    training: bool,
    eps: float,
    momentum: float = 0.0,
) -> Tensor:
    """Batch normalisation with its activation, differentiable once.

    The backward pass needs only ``x``, ``residual`` and per-channel vectors, so only these are saved.

    Args:
        counts: statistics that the backward pass updates, or None.

    The other arguments are those of
    :func:`sparsekern.kernels.backends.reference.norm_act.norm_act_forward`.

    Returns:
        ``y``, with the shape, dtype and memory format of ``x``.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has changed then.
    """
    operands = (x, residual, weight, bias, running_mean, running_var, mask)
    check(*operands, counts, activation, training, eps, momentum)
    if not traced(x):
        vectors, options = (running_mean, running_var, mask), (activation, training, eps)
        y: Tensor = _NormAct.apply(*map(_resolved, operands[:4]), (*vectors, counts, *options, momentum))
        return y
    arrays, tau, decay = ([], 1.0, 0.0) if counts is None else (counts.arrays, counts.tau, counts.decay)
    y, mean, var = torch.ops.sparsekern.norm_act.default(
        *operands, arrays, activation=activation, training=training, eps=eps, tau=tau, decay=decay
    )
    if training and momentum and running_mean is not None and running_var is not None:
        # A differentiable op may not write to its arguments, so the running statistics are updated here.
        with torch.no_grad():
            reference_norm.track(running_mean, running_var, mean, var, x.numel() // x.shape[1], momentum)
    return y


def _resolved(tensor: Tensor | None) -> Tensor | None:
    """``tensor``; a lazily negated tensor is copied, because its memory holds the opposite signs."""
    return tensor if tensor is None or not tensor.is_neg() else tensor.resolve_neg()


class _NormAct(torch.autograd.Function):
    """The op in eager mode.

    Arguments without a gradient are packed into one tuple, because each argument of ``apply`` takes time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        others: tuple[Any, ...],
    ) -> Tensor:
        running_mean, running_var, mask, counts, activation, training, eps, momentum = others
        backend = choose(x.device)
        if momentum and training and not backend.CHECKS_MEMORY:
            written = {"running_mean": running_mean, "running_var": running_var}
            check_memory(written, {"x": x, "residual": residual, "weight": weight, "bias": bias})
        y: Tensor
        y, mean, var = backend.norm_act_forward(
            x,
            residual,
            weight,
            bias,
            running_mean,
            running_var,
            mask,
            activation=activation,
            training=training,
            eps=eps,
            momentum=momentum,
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, residual, weight, bias, mean, var, mask)
        ctx.others = backend, counts, activation, training, eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        # once_differentiable only matters when gradients are recorded. Otherwise it is skipped to save time.
        return _once(ctx, grad) if torch.is_grad_enabled() else _eager_gradients(ctx, grad)


def _eager_gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the five arguments of ``_NormAct.forward``; None for all of them without ``grad``."""
    if grad is None:
        return None, None, None, None, None
    x, residual, weight, bias, mean, var, mask = ctx.saved_tensors
    backend, counts, activation, training, eps = ctx.others
    if counts is not None:
        # The arrays may have been replaced since the forward pass.
        check_counts(counts, x)
        if not backend.CHECKS_MEMORY:
            check_memory(
                named_counts(counts), {"x": x, "weight": weight, "bias": bias, "mean": mean, "var": var}
            )
    grad_x, grad_residual, grad_weight, grad_bias = backend.norm_act_backward(
        _resolved(grad),
        x,
        residual,
        weight,
        bias,
        mean,
        var,
        mask,
        activation=activation,
        training=training,
        eps=eps,
        counts=counts,
    )
    return grad_x, grad_residual, _given(grad_weight, weight), _given(grad_bias, bias), None


_once = once_differentiable(_eager_gradients)


def _given(grad: Tensor, parameter: Tensor | None) -> Tensor | None:
    """``grad`` in the dtype of the parameter; None without a parameter."""
    if parameter is None:
        return None
    return grad if grad.dtype is parameter.dtype else grad.to(parameter.dtype)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mask: Tensor | None,
    counts: list[Tensor],
    *,
    activation: str,
    training: bool,
    eps: float,
    tau: float,
    decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    operands = (x, residual, weight, bias, running_mean, running_var, mask)
    check_forward_op(*operands, counts, activation, training, eps, tau, decay)
    found: tuple[Tensor, Tensor, Tensor] = choose(x.device).norm_act_forward(
        *operands, activation=activation, training=training, eps=eps
    )
    return found


def _forward_fake(x: Tensor, *operands: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_forward_op(x, *operands, **options)
    vector = x.new_empty(x.shape[1], dtype=reference_norm.compute_dtype(x))
    return torch.empty_like(x), vector, torch.empty_like(vector)


def _backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None,
    counts: list[Tensor],
    *,
    activation: str,
    training: bool,
    eps: float,
    tau: float,
    decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands = (grad, x, residual, weight, bias, mean, var, mask)
    found = check_backward_op(*operands, counts, activation, training, eps, tau, decay)
    grad_x, grad_residual, grad_weight, grad_bias = choose(x.device).norm_act_backward(
        *operands, activation=activation, training=training, eps=eps, counts=found
    )
    # An op always returns the same number of tensors, so an empty one stands for None.
    return grad_x, x.new_empty(0) if grad_residual is None else grad_residual, grad_weight, grad_bias


def _backward_fake(
    grad: Tensor, x: Tensor, residual: Tensor | None, *operands: Any, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_backward_op(grad, x, residual, *operands, **options)
    vector = x.new_empty(x.shape[1], dtype=reference_norm.compute_dtype(x))
    grad_residual = x.new_empty(0) if residual is None else torch.empty_like(x)
    return torch.empty_like(x), grad_residual, vector, torch.empty_like(vector)


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    x, residual, weight, bias, _, _, mask, counts = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, residual, weight, bias, mean, var, mask)
    # Not saved with save_for_backward: the backward pass of another call writes to the counts, and autograd
    # would then reject this one.
    ctx.counts = counts
    ctx.options = keyword_only_inputs


def _gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, residual, weight, bias, mean, var, mask = ctx.saved_tensors
    grad_x, grad_residual, grad_weight, grad_bias = torch.ops.sparsekern.norm_act_backward.default(
        grad, x, residual, weight, bias, mean, var, mask, ctx.counts, **ctx.options
    )
    return (
        grad_x,
        None if residual is None else grad_residual,
        _given(grad_weight, weight),
        _given(grad_bias, bias),
        None,
        None,
        None,
        [None] * len(ctx.counts),
    )


_LIBRARY.impl("norm_act", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("norm_act_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("sparsekern::norm_act", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("sparsekern::norm_act_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("sparsekern::norm_act", _gradients, setup_context=_save, lib=_LIBRARY)
