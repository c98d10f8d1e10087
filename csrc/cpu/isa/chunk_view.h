// What all loops over a chunk use: its tensor, its gradient, and where the sums of its rows are stored.
#pragma once

#include "gradient_reader.h"
#include "row_factors.h"

SPARSEKERN_BEGIN_ISA

template <class S, class Update>
struct ChunkView {
  using C = typename Compute<S>::Type;

  const Job& job;
  const Chunk& chunk;
  const Shape& shape;
  const Pieces& pieces;
  const Update update;
  const GradientReader<S, Update> gradient;
  const S* const weight;
  const bool statistics;

  ChunkView(const Job& call, const Chunk& piece)
      : job(call),
        chunk(piece),
        shape(call.shapes[piece.tensor]),
        pieces(call.pieces[piece.tensor]),
        update(call, piece.tensor),
        gradient(call, piece, update),
        weight(static_cast<const S*>(call.addresses[kParam][piece.tensor])),
        statistics(call.statistics && shape.start >= 0) {}

  float* sums_of(int64_t row) const {
    if (pieces.count == 1) return job.rows.sums + (shape.start + row) * kSums;
    return job.partials + (pieces.offset + chunk.piece * shape.rows + row) * kSums;
  }

  C threshold_of(int64_t row) const { return statistics ? C(job.rows.threshold[shape.start + row]) : C(0); }

  // Begin and end of the elements of a row in this chunk, for tensors with outer == 1.
  int64_t begin_of(int64_t row) const { return row * shape.inner + chunk.inner_begin; }
  int64_t end_of(int64_t row) const { return row * shape.inner + chunk.inner_end; }

  // Number of elements of this chunk from `at` on. Memory behind them may belong to another thread.
  int64_t readable_from(int64_t at) const { return end_of(chunk.row_end - 1) - at; }

  // Sets weights and state to 0 in those of `rows` rows, of `width` elements each from `begin` on, whose fade ends in
  // this step. `fade` has `values` numbers for each row.
  void end_rows(const C* fade, int64_t begin, int64_t rows, int64_t width, int64_t values) const {
    for (int64_t r = 0; r < rows; ++r)
      if (fade[r * values] == 0) update.end(begin + r * width, width);
  }
};

SPARSEKERN_END_ISA
