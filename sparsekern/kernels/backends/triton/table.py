"""What the kernels of a step are told of a list: the layout of two arrays of int64 on the device.

``shapes`` has :data:`FIELDS` numbers of every tensor, which follow from shapes alone. ``table`` has what may
differ from call to call: numbers as the bits of float64, addresses, and how each tensor is walked.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The arguments of kernels have no types that mypy knows.

from __future__ import annotations

import triton
import triton.language as tl

from sparsekern.kernels.backends.lists import ADAM, MASK, SGD, STATISTICS, STEPS

IS_SGD, IS_ADAM, IS_STATISTICS, IS_MASK = (tl.constexpr(op) for op in (SGD, ADAM, STATISTICS, MASK))

OPTIONS = ("has_momentum", "nesterov", "first", "decoupled", "amsgrad", "maximize", "from_mean", "tracks")
"""Bits of what is compiled into a kernel."""

HAS_MOMENTUM, NESTEROV, FIRST, DECOUPLED, AMSGRAD, MAXIMIZE, FROM_MEAN, TRACKS = (
    tl.constexpr(1 << i) for i in range(len(OPTIONS))
)

FIELDS = tl.constexpr(10)
"""Of a tensor in ``shapes``: how it lies, how it is cut (as in csrc/cuda/abi.h), and its first chunk."""

OUTER, ROWS, INNER, START, OUTER_STEP, ROW_STEP, INNER_STEP, PIECES, PARTIAL, FIRST_CHUNK = (
    tl.constexpr(i) for i in range(FIELDS.value)
)

NUMBERS = ("lr", "weight_decay", "momentum", "dampening", "beta1", "beta2", "eps", "tau", "decay")
"""What ``table`` begins with."""

LR, WEIGHT_DECAY, MOMENTUM, DAMPENING, BETA1, BETA2, EPS, TAU, DECAY = (
    tl.constexpr(i) for i in range(len(NUMBERS))
)

TENSORS, PARTIALS, ARRAYS, HEAD = (tl.constexpr(len(NUMBERS) + i) for i in (0, 1, 2, 10))
"""Then: how many tensors, and the addresses of the partial sums and of the row arrays. After these the
addresses of the tensors, ``[6][tensors]``, and their variants, ``[tensors]``."""

PENALTY, ELEMENTS, COUNTDOWN, SUMS, THRESHOLD, ACTIVITY, NONFINITE, PENDING = (
    tl.constexpr(ARRAYS.value + i) for i in range(HEAD.value - ARRAYS.value)
)

PARAM, GRAD, STATE, STEP_COUNT = (tl.constexpr(slot) for slot in (0, 1, 2, STEPS))


@triton.jit
def number(table, which: tl.constexpr):
    """A number of the table, float64."""
    return tl.load(table + which).to(tl.float64, bitcast=True)


@triton.jit
def array(table, which: tl.constexpr, TYPE: tl.constexpr):
    """The address of a row array."""
    return tl.load(table + which).to(tl.pointer_type(TYPE))


@triton.jit
def address(table, slot: tl.constexpr, tensor, TYPE: tl.constexpr, ALIGNED: tl.constexpr = False):
    """The address of a tensor of the list ``slot``; ``ALIGNED`` promises that it is to sixteen bytes."""
    found = tl.load(table + HEAD + slot * tl.load(table + TENSORS) + tensor).to(tl.pointer_type(TYPE))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def variant_of(table, tensor):
    """How a tensor is walked."""
    return tl.load(table + HEAD + (STEP_COUNT + 1) * tl.load(table + TENSORS) + tensor)


@triton.jit
def conditions(table, lr, found_inf):
    """The learning rate, whether anything changes, and whether the rows take part."""
    rate = number(table, LR) if lr is None else tl.load(lr).to(tl.float64)
    changes = tl.full((), True, tl.int1) if found_inf is None else tl.load(found_inf).to(tl.float64) != 1
    return rate, changes, changes & (rate != 0)


@triton.jit
def only_if(condition, mask):
    """``mask``, or nothing of it where a condition on the whole program does not hold."""
    return tl.where(condition, mask, False)
