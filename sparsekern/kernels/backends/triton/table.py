"""Layout of the two int64 arrays on the device that describe a list of tensors to the kernels of a step.

``shapes`` has :data:`FIELDS` numbers per tensor, which depend on shapes alone. ``table`` has the values that
may change between calls: hyperparameters as the bits of float64, addresses, and the variant of each tensor.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The arguments of kernels have no types that mypy knows.

from __future__ import annotations

import triton
import triton.language as tl

from sparsekern.kernels.options import ADAM, MASK, SGD, STATISTICS, STEPS
from sparsekern.kernels.options import FLAGS as _FLAGS
from sparsekern.kernels.options import NUMBERS as _NUMBERS

IS_SGD, IS_ADAM, IS_STATISTICS, IS_MASK = (tl.constexpr(op) for op in (SGD, ADAM, STATISTICS, MASK))

OPTIONS = (*(name for name in _FLAGS if name != "scaled"), "has_momentum", "lerp_from_start", "tracks")
"""Names of the bits of ``FLAGS``, the options that are compiled into a kernel."""

NESTEROV, FIRST, DECOUPLED, AMSGRAD, MAXIMIZE, HAS_MOMENTUM, LERP_FROM_START, TRACKS = (
    tl.constexpr(1 << i) for i in range(len(OPTIONS))
)

FIELDS = tl.constexpr(10)
"""Numbers per tensor in ``shapes``: its shape, its division into chunks (as in csrc/cuda/abi.h), and the
index of its first chunk."""

OUTER, ROWS, INNER, START, OUTER_STEP, ROW_STEP, INNER_STEP, PIECES, PARTIAL, FIRST_CHUNK = (
    tl.constexpr(i) for i in range(FIELDS.value)
)

NUMBERS = tuple(name for name in _NUMBERS if name != "grad_scale")
"""The hyperparameters at the beginning of ``table``."""

LR, WEIGHT_DECAY, MOMENTUM, DAMPENING, BETA1, BETA2, EPS, TAU, DECAY = (
    tl.constexpr(i) for i in range(len(NUMBERS))
)

TENSORS, PARTIALS, ARRAYS, HEAD = (tl.constexpr(len(NUMBERS) + i) for i in (0, 1, 2, 10))
"""Next in ``table``: the number of tensors, the address of the partial sums, and the addresses of the row
arrays. The addresses of the tensors, ``[6][tensors]``, and their variants, ``[tensors]``, follow."""

PENALTY, ELEMENTS, COUNTDOWN, SUMS, THRESHOLD, ACTIVITY, NONFINITE, PENDING = (
    tl.constexpr(ARRAYS.value + i) for i in range(HEAD.value - ARRAYS.value)
)

PARAM, GRAD, STATE, STEP_COUNT = (tl.constexpr(slot) for slot in (0, 1, 2, STEPS))


@triton.jit
def number(table, which: tl.constexpr):
    """Hyperparameter ``which`` of the table, float64."""
    return tl.load(table + which).to(tl.float64, bitcast=True)


@triton.jit
def array(table, which: tl.constexpr, TYPE: tl.constexpr):
    """Pointer to row array ``which``, with elements of ``TYPE``."""
    return tl.load(table + which).to(tl.pointer_type(TYPE))


@triton.jit
def address(table, slot: tl.constexpr, tensor, TYPE: tl.constexpr, ALIGNED: tl.constexpr = False):
    """Pointer to a tensor of the list ``slot``; ``ALIGNED`` promises alignment to 16 bytes."""
    found = tl.load(table + HEAD + slot * tl.load(table + TENSORS) + tensor).to(tl.pointer_type(TYPE))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def variant_of(table, tensor):
    """Index of the tensor's entry in ``VARIANTS``."""
    return tl.load(table + HEAD + (STEP_COUNT + 1) * tl.load(table + TENSORS) + tensor)


@triton.jit
def conditions(table, lr, found_inf):
    """The learning rate, whether the step changes anything, and whether it updates the row arrays.

    ``found_inf`` of 1 skips the step. A learning rate of 0 leaves the row arrays unchanged.
    """
    rate = number(table, LR) if lr is None else tl.load(lr).to(tl.float64)
    changes = tl.full((), True, tl.int1) if found_inf is None else tl.load(found_inf).to(tl.float64) != 1
    return rate, changes, changes & (rate != 0)


@triton.jit
def only_if(condition, mask):
    """``mask`` if the scalar ``condition`` holds, else False everywhere."""
    return tl.where(condition, mask, False)
