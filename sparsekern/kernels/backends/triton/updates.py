"""The updates of elements, in torch's order of operations, and their hyperparameters per tensor.

In the updates, ``at`` are offsets of a tile's elements, and ``inside`` tells whether they are processed.
``clears`` tells whether their row becomes zero. ``w`` are weights, and ``d`` are gradients that include
coupled weight decay.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The arguments of kernels have no types that mypy knows.

from __future__ import annotations

import triton
import triton.language as tl

from sparsekern.kernels.backends.triton.table import (
    AMSGRAD,
    BETA1,
    BETA2,
    DAMPENING,
    EPS,
    FIRST,
    HAS_MOMENTUM,
    IS_ADAM,
    LERP_FROM_START,
    MOMENTUM,
    NESTEROV,
    STATE,
    STEP_COUNT,
    address,
    number,
)


@triton.jit
def divided(a, b):
    """The correctly rounded ``a / b``; Triton's float32 division is not correctly rounded."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def _square_root(a):
    """The correctly rounded square root."""
    if a.dtype == tl.float32:
        return tl.sqrt_rn(a)
    else:
        return tl.sqrt(a)


@triton.jit
def _power(base, exponent):
    """``base`` to the power of a non-negative integer, float64, by repeated squaring."""
    result = tl.full((), 1, tl.float64)
    while exponent > 0:
        result = tl.where(exponent & 1 == 1, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def hyper_of(table, tensor, rate, OP: tl.constexpr, COMPUTE: tl.constexpr):
    """Hyperparameters of an update for all elements of a tensor.

    Adam has six: step size, inverse root of the second bias correction, 1 - beta1, beta2, 1 - beta2, eps.
    SGD has three (rate, momentum, 1 - dampening), padded to six with copies of the last one.
    """
    if OP == IS_ADAM:
        # The next launch increments the step counter.
        count = (tl.load(address(table, STEP_COUNT, tensor, tl.float32)) + 1).to(tl.int64)
        beta1, beta2 = number(table, BETA1), number(table, BETA2)
        step_size = rate / (1 - _power(beta1, count))
        inverse_root = 1 / tl.sqrt(1 - _power(beta2, count))
        lerp_weight, one_minus_beta2 = (1 - beta1).to(COMPUTE), (1 - beta2).to(COMPUTE)
        beta2, eps = beta2.to(COMPUTE), number(table, EPS).to(COMPUTE)
        return step_size.to(COMPUTE), inverse_root.to(COMPUTE), lerp_weight, beta2, one_minus_beta2, eps
    else:
        momentum = number(table, MOMENTUM).to(COMPUTE)
        undamped = (1 - number(table, DAMPENING)).to(COMPUTE)
        return rate.to(COMPUTE), momentum, undamped, undamped, undamped, undamped


@triton.jit
def sgd(
    table,
    tensor,
    at,
    inside,
    clears,
    w,
    d,
    hyper,
    FLAGS: tl.constexpr,
    STORAGE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Return the new weights of SGD, and update the momentum buffers in memory."""
    if HAS_MOMENTUM & FLAGS:
        buffers = address(table, STATE, tensor, STORAGE, ALIGNED)
        buffer = d
        if not FIRST & FLAGS:
            buffer = tl.load(buffers + at, mask=inside, other=0).to(d.dtype) * hyper[1] + d * hyper[2]
        tl.store(buffers + at, tl.where(clears, 0, buffer).to(STORAGE), mask=inside)
        d = d + buffer * hyper[1] if NESTEROV & FLAGS else buffer
    return w - d * hyper[0]


@triton.jit
def adam(
    table,
    tensor,
    at,
    inside,
    clears,
    w,
    d,
    hyper,
    FLAGS: tl.constexpr,
    STORAGE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Return the new weights of Adam, and update its state in memory."""
    step_size, inverse_root, lerp_weight, beta2, one_minus_beta2, eps = hyper
    means = address(table, STATE, tensor, STORAGE, ALIGNED)
    squares = address(table, STATE + 1, tensor, STORAGE, ALIGNED)
    mean = tl.load(means + at, mask=inside, other=0).to(d.dtype)
    square = tl.load(squares + at, mask=inside, other=0).to(d.dtype)
    # torch.lerp uses one formula for weights below 0.5 and another one from 0.5 on.
    mean = mean + lerp_weight * (d - mean) if LERP_FROM_START & FLAGS else d - (d - mean) * (1 - lerp_weight)
    square = square * beta2 + d * one_minus_beta2 * d
    tl.store(means + at, tl.where(clears, 0, mean).to(STORAGE), mask=inside)
    tl.store(squares + at, tl.where(clears, 0, square).to(STORAGE), mask=inside)
    top = square
    if AMSGRAD & FLAGS:
        tops = address(table, STATE + 2, tensor, STORAGE, ALIGNED)
        highest = tl.load(tops + at, mask=inside, other=0).to(d.dtype)
        # NaN counts as the larger value.
        top = tl.where((square > highest) | (square != square), square, highest)
        tl.store(tops + at, tl.where(clears, 0, top).to(STORAGE), mask=inside)
    return w - divided(step_size * mean, _square_root(top) * inverse_root + eps)
