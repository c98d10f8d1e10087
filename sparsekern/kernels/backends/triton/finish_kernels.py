"""The second launch of a step, as in ``csrc/cuda/finish.cu``, and the means per channel."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The arguments of kernels have no types that mypy knows.

from __future__ import annotations

import triton
import triton.language as tl

from sparsekern.kernels.backends.triton.sums import COUNT, DOT, GRAD_SQ, WEIGHT_SQ, sums_of
from sparsekern.kernels.backends.triton.table import (
    ACTIVITY,
    COUNTDOWN,
    DECAY,
    ELEMENTS,
    FIELDS,
    IS_ADAM,
    IS_MASK,
    IS_STATISTICS,
    NONFINITE,
    PENDING,
    ROWS,
    START,
    STEP_COUNT,
    SUMS,
    TAU,
    THRESHOLD,
    TRACKS,
    address,
    array,
    conditions,
    number,
    only_if,
)


@triton.jit
def _statistics(table, entry, BLOCK: tl.constexpr):
    """Store the sums, mean activities and next thresholds of a tensor's rows."""
    start, rows = tl.load(entry + START), tl.load(entry + ROWS)
    elements = array(table, ELEMENTS, tl.float32)
    squares = tl.zeros((BLOCK,), tl.float64)
    counted = tl.zeros((BLOCK,), tl.int64)
    spoilt = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        _, _, grad_sq, weight_sq, counts, spoils = sums_of(table, entry, row, row < rows)
        squares += tl.where(counts, grad_sq.to(tl.float64) * weight_sq.to(tl.float64), 0)
        counted += counts.to(tl.int64)
        spoilt += spoils.to(tl.int64)
    # If no row counts, no threshold is stored; the maximum only avoids a division by 0.
    number_of = tl.maximum(tl.sum(counted, 0), 1).to(tl.float64) * tl.load(elements + start).to(tl.float64)
    reach = number(table, TAU) * tl.sqrt(tl.sum(squares, 0) / number_of)
    decay = number(table, DECAY)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        there = row < rows
        count, dot, grad_sq, weight_sq, counts, _ = sums_of(table, entry, row, there)
        out = array(table, SUMS, tl.float32) + (start + row) * 4
        tl.store(out + COUNT, tl.where(counts, count, 0), mask=there)
        tl.store(out + DOT, tl.where(counts, dot, 0), mask=there)
        tl.store(out + GRAD_SQ, tl.where(counts, grad_sq, 0), mask=there)
        tl.store(out + WEIGHT_SQ, tl.where(counts, weight_sq, 0), mask=there)
        activity = array(table, ACTIVITY, tl.float32) + start + row
        counted_share = tl.div_rn(count, tl.load(elements + start + row, mask=there, other=1))
        blended = tl.load(activity, mask=counts, other=0) * decay.to(tl.float32)
        tl.store(activity, blended + counted_share * (1 - decay).to(tl.float32), mask=counts)
        norm = tl.sqrt(tl.where(weight_sq == 0, 1, weight_sq).to(tl.float64))
        threshold = tl.where(weight_sq == 0, float("inf"), reach / norm).to(tl.float32)
        tl.store(array(table, THRESHOLD, tl.float32) + start + row, threshold, mask=counts)
    tl.store(array(table, PENDING, tl.float32), 1.0)
    tl.atomic_add(array(table, NONFINITE, tl.int64), tl.sum(spoilt, 0))


@triton.jit
def finish(
    table,
    shapes,
    lr,
    found_inf,
    OP: tl.constexpr,
    FLAGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the sums of a tensor's rows and update its state between steps; one program per tensor.

    Args:
        table, shapes, lr, found_inf, OP, FLAGS: as in ``step_kernels.step``.
        BLOCK: number of rows that are processed at once.
    """
    _, go, update_statistics = conditions(table, lr, found_inf)
    if go:
        tensor = tl.program_id(0).to(tl.int64)
        entry = shapes + tensor * FIELDS
        if OP == IS_ADAM:
            step = address(table, STEP_COUNT, tensor, tl.float32)
            tl.store(step, tl.load(step) + 1)
        if TRACKS & FLAGS:
            start, rows = tl.load(entry + START), tl.load(entry + ROWS)
            if (start >= 0) & update_statistics:
                if OP != IS_MASK:
                    _statistics(table, entry, BLOCK)
                if OP != IS_STATISTICS:
                    for first in range(0, rows, BLOCK):
                        row = first + tl.arange(0, BLOCK)
                        countdown = array(table, COUNTDOWN, tl.int32) + start + row
                        left = tl.load(countdown, mask=row < rows, other=0)
                        tl.store(countdown, left - 1, mask=left > 0)


@triton.jit(do_not_specialize=("channels",))
def fold_channels(
    offsets,
    gates,
    sums,
    means,
    mean_squares,
    pending,
    channels,
    decay,
    one_minus_decay,
    BLOCK: tl.constexpr,
):
    """Update the means per channel of the dot and its square; one program per ``BLOCK`` channels.

    Args:
        offsets: int64 ``[channels + 1]``, where each channel's entries begin in ``gates``.
        gates: int64 ``[G]``, rows of the channels' gates.
        sums: float32 ``[rows, 4]``.
        means: float32 ``[channels]``, running means of the dot.
        mean_squares: float32 ``[channels]``, running means of its square.
        pending: one element; 0 leaves the means unchanged.
        channels: number of channels.
        decay: weight of the old means.
        one_minus_decay: weight of the new values.
        BLOCK: number of channels per program.
    """
    channel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = channel < channels
    update_statistics = tl.load(pending) != 0
    begin = tl.load(offsets + channel, mask=there, other=0)
    end = tl.load(offsets + channel + 1, mask=there, other=0)
    x = tl.zeros((BLOCK,), tl.float32)
    for gate in range(0, tl.max(end - begin, 0)):
        more = begin + gate < end
        row = tl.load(gates + begin + gate, mask=more, other=0)
        x += tl.load(sums + row * 4 + DOT, mask=more, other=0)
    mean = tl.load(means + channel, mask=there, other=0)
    square = tl.load(mean_squares + channel, mask=there, other=0)
    tl.store(means + channel, mean * decay + x * one_minus_decay, mask=only_if(update_statistics, there))
    tl.store(
        mean_squares + channel,
        square * decay + x * x * one_minus_decay,
        mask=only_if(update_statistics, there),
    )
