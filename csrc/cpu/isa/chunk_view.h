// What all ways through a chunk share: its tensor, its gradient, and where the sums of its rows go.
#pragma once

#include "gradient_reader.h"

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

  // The first element of a row, and the one behind its last, where all of a row lies in one piece.
  int64_t begin_of(int64_t row) const { return row * shape.inner + chunk.inner_begin; }
  int64_t end_of(int64_t row) const { return row * shape.inner + chunk.inner_end; }

  // How many elements of this chunk there are from `at` on; what lies behind may be another thread's.
  int64_t readable_from(int64_t at) const { return end_of(chunk.row_end - 1) - at; }

  // Ends the fades that end in this step, of `rows` rows of `width` elements from `begin` on. `fade` has `values`
  // numbers for each row.
  void end_rows(const C* fade, int64_t begin, int64_t rows, int64_t width, int64_t values) const {
    for (int64_t r = 0; r < rows; ++r)
      if (fade[r * values] == 0) update.end(begin + r * width, width);
  }
};

SPARSEKERN_END_ISA
