"""The first launch of a step, as in ``csrc/cuda/step.cuh``: one program for each chunk of a list of tensors.

Each multiplication and addition is rounded separately, in the order of the reference.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The arguments of kernels have no types that mypy knows.

from __future__ import annotations

import triton
import triton.language as tl

from sparsekern.kernels.backends.triton.sums import store_sums
from sparsekern.kernels.backends.triton.table import (
    COUNTDOWN,
    DECOUPLED,
    FIELDS,
    FIRST_CHUNK,
    GRAD,
    INNER,
    INNER_STEP,
    IS_ADAM,
    IS_MASK,
    IS_SGD,
    IS_STATISTICS,
    MAXIMIZE,
    OUTER,
    OUTER_STEP,
    PARAM,
    PENALTY,
    PIECES,
    ROW_STEP,
    ROWS,
    START,
    THRESHOLD,
    TRACKS,
    WEIGHT_DECAY,
    address,
    array,
    conditions,
    number,
    only_if,
    variant_of,
)
from sparsekern.kernels.backends.triton.updates import adam, divided, hyper_of, sgd

VARIANTS = tl.constexpr(
    (
        (1, 1, 1024, True),
        (1, 1, 1024, False),
        (1, 4, 256, True),
        (1, 4, 256, False),
        (1, 32, 32, False),
        (8, 32, 4, False),
    )
)
"""Tile of each variant: outer indices, rows, inner elements, and whether its accesses have 16 bytes. Variants
are long rows (2), medium rows (2), short rows, and short rows behind an outer dimension."""


@triton.jit
def _factors(
    table,
    start,
    row,
    there,
    rate,
    update_statistics,
    OP: tl.constexpr,
    FLAGS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Values per row: whether it is live, whether its fade-out ends, its weight decay, its fade-out factor.

    The weight decay is a coefficient of the gradient, or a factor of the weight if it is decoupled.
    """
    tracked = only_if(start >= 0, there)
    penalty = tl.load(array(table, PENALTY, tl.float32) + start + row, mask=tracked, other=0)
    left = tl.load(array(table, COUNTDOWN, tl.int32) + start + row, mask=tracked, other=-1)
    decay = number(table, WEIGHT_DECAY) + penalty.to(tl.float64)
    if OP == IS_MASK or DECOUPLED & FLAGS:
        decay = 1 - rate * decay
    fades = only_if(update_statistics, left > 0)
    steps = tl.where(fades, left, 1).to(COMPUTE)
    fade = tl.where(fades, divided(steps - 1, steps), 1)
    return left != 0, fades & (left == 1), decay.to(COMPUTE), fade


@triton.jit
def _tile(
    table,
    tensor,
    at,
    inside,
    scale,
    threshold,
    clears,
    decay,
    fade,
    hyper,
    OP: tl.constexpr,
    FLAGS: tl.constexpr,
    STORAGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Step the elements of a tile, each read and written once; return the summands of the four sums."""
    weights = address(table, PARAM, tensor, STORAGE, ALIGNED)
    w = tl.load(weights + at, mask=inside, other=0).to(COMPUTE)
    d = tl.zeros(w.shape, COMPUTE)
    if OP != IS_MASK:
        gradients = address(table, GRAD, tensor, STORAGE, ALIGNED)
        d = tl.load(gradients + at, mask=inside, other=0).to(COMPUTE)
        if scale is not None:
            d = divided(d, scale)
            tl.store(gradients + at, d.to(STORAGE), mask=inside)
        if MAXIMIZE & FLAGS:
            d = -d
    exceeds = (tl.abs(d) > threshold).to(COMPUTE)
    dot, grad_sq, weight_sq = w * d, d * d, w * w
    if OP == IS_MASK or DECOUPLED & FLAGS:
        w = w * decay
    elif OP != IS_STATISTICS:
        d = tl.where(decay != 0, d + w * decay, d)
    if OP == IS_SGD:
        w = sgd(table, tensor, at, inside, clears, w, d, hyper, FLAGS, STORAGE, ALIGNED)
    elif OP == IS_ADAM:
        w = adam(table, tensor, at, inside, clears, w, d, hyper, FLAGS, STORAGE, ALIGNED)
    if OP != IS_STATISTICS:
        tl.store(weights + at, tl.where(clears, 0, w * fade).to(STORAGE), mask=inside)
    return exceeds, dot, grad_sq, weight_sq


@triton.jit
def _some_rows(
    table,
    entry,
    tensor,
    row,
    there,
    outer_begin,
    outer_end,
    inner_begin,
    inner_end,
    piece,
    scale,
    rate,
    update_statistics,
    hyper,
    OP: tl.constexpr,
    FLAGS: tl.constexpr,
    STORAGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    OUTERS: tl.constexpr,
    INNERS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Step a chunk's part of some rows, tile by tile, and store their sums."""
    start, rows, inner = tl.load(entry + START), tl.load(entry + ROWS), tl.load(entry + INNER)
    if ALIGNED:
        inner = tl.multiple_of(inner, 16)
    live, ends, decay, fade = _factors(table, start, row, there, rate, update_statistics, OP, FLAGS, COMPUTE)
    # The mask op changes few rows. The memory of unchanged rows is not accessed.
    works = there & (~live | (decay != 1) | (fade != 1)) if OP == IS_MASK else there & live
    if OP >= IS_STATISTICS:
        works = only_if(start >= 0, works)
    clears = (ends | ~live)[None, :, None]
    reach = array(table, THRESHOLD, tl.float32) + start + row
    threshold = tl.load(reach, mask=only_if(start >= 0, there), other=float("inf")).to(COMPUTE)
    if tl.sum(works.to(tl.int32)) == 0:
        outer_end = outer_begin
    count = tl.zeros((OUTERS, row.shape[0], INNERS), COMPUTE)
    dot, grad_sq, weight_sq = count, count, count
    for o in range(outer_begin, outer_end, OUTERS):
        for i in range(inner_begin, inner_end, INNERS):
            o_at, i_at = o + tl.arange(0, OUTERS), i + tl.arange(0, INNERS)
            at = (o_at[:, None, None] * rows + row[None, :, None]) * inner + i_at[None, None, :]
            inside = (o_at < outer_end)[:, None, None] & (i_at < inner_end)[None, None, :]
            one, two, three, four = _tile(
                table,
                tensor,
                at,
                inside & works[None, :, None],
                scale,
                threshold[None, :, None],
                clears,
                decay[None, :, None],
                fade[None, :, None],
                hyper,
                OP,
                FLAGS,
                STORAGE,
                COMPUTE,
                ALIGNED,
            )
            count, dot, grad_sq, weight_sq = count + one, dot + two, grad_sq + three, weight_sq + four
    if TRACKS & FLAGS and OP != IS_MASK:
        counted = only_if((start >= 0) & update_statistics, there)
        store_sums(table, entry, piece, row, counted, count, dot, grad_sq, weight_sq)


@triton.jit
def _step_chunk(
    table,
    shapes,
    tensor,
    chunk,
    scale,
    rate,
    update_statistics,
    OP: tl.constexpr,
    FLAGS: tl.constexpr,
    STORAGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    OUTERS: tl.constexpr,
    MANY: tl.constexpr,
    INNERS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Step a chunk of a tensor, some rows at a time. The pieces of the same rows are consecutive chunks."""
    entry = shapes + tensor * FIELDS
    outer, rows, inner = tl.load(entry + OUTER), tl.load(entry + ROWS), tl.load(entry + INNER)
    outer_step, row_step = tl.load(entry + OUTER_STEP), tl.load(entry + ROW_STEP)
    inner_step, pieces = tl.load(entry + INNER_STEP), tl.load(entry + PIECES)
    if ALIGNED:
        inner, inner_step = tl.multiple_of(inner, 16), tl.multiple_of(inner_step, 16)
    piece, across = chunk % pieces, tl.cdiv(inner, inner_step)
    outer_begin, row_begin = piece // across * outer_step, chunk // pieces * row_step
    inner_begin = piece % across * inner_step
    row_end = tl.minimum(rows, row_begin + row_step)
    hyper = hyper_of(table, tensor, rate, OP, COMPUTE)
    for first in range(row_begin, row_end, MANY):
        row = first + tl.arange(0, MANY)
        _some_rows(
            table,
            entry,
            tensor,
            row,
            row < row_end,
            outer_begin,
            tl.minimum(outer, outer_begin + outer_step),
            inner_begin,
            tl.minimum(inner, inner_begin + inner_step),
            piece,
            scale,
            rate,
            update_statistics,
            hyper,
            OP,
            FLAGS,
            STORAGE,
            COMPUTE,
            OUTERS,
            INNERS,
            ALIGNED,
        )


@triton.jit
def step(
    table,
    shapes,
    owners,
    lr,
    grad_scale,
    found_inf,
    OP: tl.constexpr,
    FLAGS: tl.constexpr,
    STORAGE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Step one chunk per program.

    Args:
        table: int64, see :mod:`~sparsekern.kernels.backends.triton.table`.
        shapes: int64 ``[tensors, FIELDS]``, see the same module.
        owners: int32 ``[chunks]``, index of each chunk's tensor.
        lr: one element, or None for the rate in ``table``.
        grad_scale: one element by which gradients are divided, or None.
        found_inf: one element, 1 to skip the step, or None.
        OP: the operation, one of the ``IS_`` constants.
        FLAGS: bits of the names in ``table.OPTIONS``.
        STORAGE: type of the tensors.
        COMPUTE: type of the arithmetic.
    """
    rate, go, update_statistics = conditions(table, lr, found_inf)
    if go:
        program = tl.program_id(0)
        tensor = tl.load(owners + program).to(tl.int64)
        chunk = program - tl.load(shapes + tensor * FIELDS + FIRST_CHUNK)
        variant = variant_of(table, tensor)
        scale = None
        if grad_scale is not None:
            scale = tl.load(grad_scale).to(COMPUTE)
        for which in tl.static_range(6):
            if variant == which:
                _step_chunk(
                    table,
                    shapes,
                    tensor,
                    chunk,
                    scale,
                    rate,
                    update_statistics,
                    OP,
                    FLAGS,
                    STORAGE,
                    COMPUTE,
                    VARIANTS[which][0],
                    VARIANTS[which][1],
                    VARIANTS[which][2],
                    VARIANTS[which][3],
                )
