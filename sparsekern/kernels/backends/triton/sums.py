"""The four sums per row: storing those of each chunk, and adding them up after all chunks."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The arguments of kernels have no types that mypy knows.

from __future__ import annotations

import triton
import triton.language as tl

from sparsekern.kernels import rows as _rows
from sparsekern.kernels.backends.triton.table import (
    COUNTDOWN,
    PARTIAL,
    PARTIALS,
    PIECES,
    ROWS,
    START,
    SUMS,
    array,
)

COUNT, DOT, GRAD_SQ, WEIGHT_SQ = (
    tl.constexpr(column) for column in (_rows.COUNT, _rows.DOT, _rows.GRAD_SQ, _rows.WEIGHT_SQ)
)

# Number of float32 sums per row, and their size in bytes.
_WIDTH, _BYTES = tl.constexpr(4), tl.constexpr(16)


@triton.jit
def _place(table, entry, piece):
    """Pointer to the sums of a tensor's rows: in the row arrays, or in the partial sums of ``piece``."""
    whole = tl.load(table + SUMS) + tl.load(entry + START) * _BYTES
    part = tl.load(table + PARTIALS) + (tl.load(entry + PARTIAL) + piece * tl.load(entry + ROWS)) * _BYTES
    return tl.where(tl.load(entry + PIECES) == 1, whole, part).to(tl.pointer_type(tl.float32))


@triton.jit
def _over_all_but_rows(tile):
    """Sums of a tile ``[outer, rows, inner]`` per row, float32."""
    return tl.sum(tl.sum(tile, 2), 0).to(tl.float32)


@triton.jit
def store_sums(table, entry, piece, row, there, count, dot, grad_sq, weight_sq):
    """Store the sums of a chunk's rows, given as tiles ``[outer, rows, inner]``."""
    out = _place(table, entry, piece) + row * _WIDTH
    tl.store(out + COUNT, _over_all_but_rows(count), mask=there)
    tl.store(out + DOT, _over_all_but_rows(dot), mask=there)
    tl.store(out + GRAD_SQ, _over_all_but_rows(grad_sq), mask=there)
    tl.store(out + WEIGHT_SQ, _over_all_but_rows(weight_sq), mask=there)


@triton.jit
def _folded(table, entry, row, there, column: tl.constexpr):
    """One sum of each row: the rounded sums of its pieces, added in order in float64."""
    at = row * _WIDTH + column
    found = tl.load(_place(table, entry, 0) + at, mask=there, other=0).to(tl.float64)
    for piece in range(1, tl.load(entry + PIECES)):
        found += tl.load(_place(table, entry, piece) + at, mask=there, other=0).to(tl.float64)
    return found.to(tl.float32)


@triton.jit
def _is_finite(value):
    """Whether ``value`` is neither infinite nor NaN."""
    return value - value == 0


@triton.jit
def sums_of(table, entry, row, there):
    """The four sums of rows, whether rows are live with finite sums, and whether live without finite sums."""
    left = tl.load(array(table, COUNTDOWN, tl.int32) + tl.load(entry + START) + row, mask=there, other=0)
    live = left != 0
    count = _folded(table, entry, row, live, COUNT)
    dot = _folded(table, entry, row, live, DOT)
    grad_sq = _folded(table, entry, row, live, GRAD_SQ)
    weight_sq = _folded(table, entry, row, live, WEIGHT_SQ)
    finite = _is_finite(count) & _is_finite(dot) & _is_finite(grad_sq) & _is_finite(weight_sq)
    return count, dot, grad_sq, weight_sq, live & finite, live & ~finite
