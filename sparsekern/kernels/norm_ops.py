"""The ops of batch normalisation with its activation: schemas, fakes and autograd.

As in :mod:`sparsekern.kernels.ops`, calls under tracing use ``torch.ops.sparsekern``, and calls in eager mode
go directly to the backend. The dispatcher and its way back into Python take longer than a small layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
from sparsekern.kernels.options import Moments, NormInputs, NormOptions, Running

_LIBRARY = torch.library.Library("sparsekern", "FRAGMENT")

# The fields of NormInputs, and of NormOptions without the momentum: an op writes no running statistics.
_INPUTS = ", ".join(f"Tensor{'?' if name != 'x' else ''} {name}" for name in NormInputs._fields)
_OPTIONS = "*, str activation, bool training, float eps, float tau, float decay"
_LIBRARY.define(
    f"norm_act({_INPUTS}, Tensor? running_mean, Tensor? running_var, Tensor[] counts, {_OPTIONS}) "
    f"-> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    f"norm_act_backward(Tensor grad, {_INPUTS}, Tensor mean, Tensor var, Tensor(a!)[] counts, {_OPTIONS}) "
    f"-> (Tensor, Tensor, Tensor, Tensor)"
)


def norm_act(
    inputs: NormInputs, running: Running, options: NormOptions, counts: ChannelCounts | None = None
) -> Tensor:
    """Batch normalisation with its activation, differentiable once.

    The backward pass needs only ``x``, ``residual`` and per-channel vectors, so only these are saved.

    Args:
        inputs: the data, the affine parameters and the mask.
        running: the running statistics; used unless training, and written in training with a momentum.
        options: the options.
        counts: statistics that the backward pass updates, or None.

    Returns:
        ``y``, with the shape, dtype and memory format of ``x``.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has changed then.
    """
    check(inputs, running, options, counts)
    if not traced(inputs.x):
        y: Tensor = _NormAct.apply(*map(_resolved, inputs[:4]), (inputs.mask, running, options, counts))
        return y
    arrays, tau, decay = ([], 1.0, 0.0) if counts is None else (counts.arrays, counts.tau, counts.decay)
    activation, training, eps, momentum = options
    y, mean, var = torch.ops.sparsekern.norm_act.default(
        *inputs, *running, arrays, activation=activation, training=training, eps=eps, tau=tau, decay=decay
    )
    if training:
        # A differentiable op may not write to its arguments, so the running statistics are updated here.
        with torch.no_grad():
            reference_norm.track(running, mean, var, inputs.x.numel() // inputs.x.shape[1], momentum)
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
        others: tuple[Tensor | None, Running, NormOptions, ChannelCounts | None],
    ) -> Tensor:
        mask, running, options, counts = others
        inputs = NormInputs(x, residual, weight, bias, mask)
        backend = choose(x.device)
        if options.momentum and options.training and not backend.CHECKS_MEMORY:
            written = {"running_mean": running.mean, "running_var": running.var}
            check_memory(written, {"x": x, "residual": residual, "weight": weight, "bias": bias})
        y: Tensor
        y, mean, var = backend.norm_act_forward(inputs, running, options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, mean, var)
        ctx.others = backend, options, counts
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        # once_differentiable only matters when gradients are recorded. Otherwise it is skipped to save time.
        return _once(ctx, grad) if torch.is_grad_enabled() else _eager_gradients(ctx, grad)


def _eager_gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the five arguments of ``_NormAct.forward``; None for all of them without ``grad``."""
    if grad is None:
        return None, None, None, None, None
    *saved, mean, var = ctx.saved_tensors
    inputs = NormInputs(*saved)
    x, _, weight, bias, _ = inputs
    backend, options, counts = ctx.others
    if counts is not None:
        # The arrays may have been replaced since the forward pass.
        check_counts(counts, x)
        if not backend.CHECKS_MEMORY:
            check_memory(
                named_counts(counts), {"x": x, "weight": weight, "bias": bias, "mean": mean, "var": var}
            )
    grad_x, grad_residual, grad_weight, grad_bias = backend.norm_act_backward(
        _resolved(grad), inputs, Moments(mean, var), options, counts
    )
    return grad_x, grad_residual, _given(grad_weight, weight), _given(grad_bias, bias), None


_once = once_differentiable(_eager_gradients)


def _given(grad: Tensor, parameter: Tensor | None) -> Tensor | None:
    """``grad`` in the dtype of the parameter; None without a parameter."""
    if parameter is None:
        return None
    return grad if grad.dtype is parameter.dtype else grad.to(parameter.dtype)


class _OfOp(NamedTuple):
    """The keyword arguments of both ops."""

    activation: str
    training: bool
    eps: float
    tau: float
    decay: float

    @property
    def options(self) -> NormOptions:
        """The options of the normalisation."""
        return NormOptions(self.activation, self.training, self.eps)


def _forward_arguments(
    operands: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[NormInputs, Running, NormOptions]:
    """The checked arguments of ``norm_act``."""
    inputs, running, counts = NormInputs(*operands[:5]), Running(*operands[5:7]), operands[7]
    given = _OfOp(**keywords)
    check_forward_op(inputs, running, given.options, counts, given.tau, given.decay)
    return inputs, running, given.options


def _backward_arguments(
    operands: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[Tensor, NormInputs, Moments, NormOptions, ChannelCounts | None]:
    """The checked arguments of ``norm_act_backward``."""
    grad, inputs, moments = operands[0], NormInputs(*operands[1:6]), Moments(*operands[6:8])
    given = _OfOp(**keywords)
    found = check_backward_op(grad, inputs, moments, given.options, operands[8], given.tau, given.decay)
    return grad, inputs, moments, given.options, found


def _forward(*operands: Any, **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, running, options = _forward_arguments(operands, keywords)
    found: tuple[Tensor, Tensor, Tensor] = choose(inputs.x.device).norm_act_forward(inputs, running, options)
    return found


def _forward_fake(*operands: Any, **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
    (x, *_), _, _ = _forward_arguments(operands, keywords)
    return torch.empty_like(x), *_fake_vectors(x)


def _backward(*operands: Any, **keywords: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = _backward_arguments(operands, keywords)
    x = arguments[1].x
    grad_x, grad_residual, grad_weight, grad_bias = choose(x.device).norm_act_backward(*arguments)
    # An op always returns the same number of tensors, so an empty one stands for None.
    return grad_x, x.new_empty(0) if grad_residual is None else grad_residual, grad_weight, grad_bias


def _backward_fake(*operands: Any, **keywords: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, (x, residual, *_), *_ = _backward_arguments(operands, keywords)
    grad_residual = x.new_empty(0) if residual is None else torch.empty_like(x)
    return torch.empty_like(x), grad_residual, *_fake_vectors(x)


def _fake_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two vectors ``[C]`` in the compute type."""
    vector = x.new_empty(x.shape[1], dtype=reference_norm.compute_dtype(x))
    return vector, torch.empty_like(vector)


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    *operands, _, _, counts = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(*operands, mean, var)
    # Not saved with save_for_backward: the backward pass of another call writes to the counts, and autograd
    # would then reject this one.
    ctx.counts = counts
    ctx.options = keyword_only_inputs


def _gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    *operands, mean, var = ctx.saved_tensors
    _, residual, weight, bias, _ = operands
    grad_x, grad_residual, grad_weight, grad_bias = torch.ops.sparsekern.norm_act_backward.default(
        grad, *operands, mean, var, ctx.counts, **ctx.options
    )
    grad_residual = None if residual is None else grad_residual
    of_inputs = NormInputs(grad_x, grad_residual, _given(grad_weight, weight), _given(grad_bias, bias))
    return *of_inputs, *Running(), [None] * len(ctx.counts)


_LIBRARY.impl("norm_act", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("norm_act_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("sparsekern::norm_act", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("sparsekern::norm_act_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("sparsekern::norm_act", _gradients, setup_context=_save, lib=_LIBRARY)
