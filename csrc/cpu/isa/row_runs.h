// The loop for contiguous rows, with AVX-512 for short ones: one fused loop runs through all live rows of a tile. For
// rows of 9 to 40 elements it is twice as fast as taking the statistics row by row before updating all rows together.
#pragma once

#include "chunk_view.h"
#include "fused_update.h"

#if defined(__AVX2__)
SPARSEKERN_BEGIN_ISA

// Shortest row that has a loop of its own (long_rows.h).
constexpr int64_t kOwnLoopRow = 256;

template <class S, class Update>
class RowRuns {
 public:
  using C = typename Compute<S>::Type;

  explicit RowRuns(const ChunkView<S, Update>& view) : view_(view) {}

  static bool takes(const ChunkView<S, Update>& view) {
    if constexpr (kFusesRows<S> && Update::kTakesRowRuns) {
      const Shape& shape = view.shape;
      const bool any_length = kVectorBytes == 32 && !view.job.apart;
      return view.statistics && shape.outer == 1 && shape.inner >= kLongRow && shape.inner % kRowUnit<S> == 0 &&
             (any_length || shape.inner < kOwnLoopRow) && view.gradient.unmodified() && view.update.takes_row_runs();
    }
    return false;
  }

  void run() {
    static_assert(kPrefetchDistance<S, 1> <= kMaxRowsAhead * kLongRow);
    if constexpr (kFusesRows<S> && Update::kTakesRowRuns) {
      const Chunk& chunk = view_.chunk;
      for (int64_t row = chunk.row_begin; row < chunk.row_end; row += kTile)
        update_tile(row, minimum(kTile, chunk.row_end - row), chunk.inner_end - chunk.inner_begin);
    }
  }

 private:
  void update_tile(int64_t row, int64_t rows, int64_t width) {
    const RowMix mix = factors_.of_rows(view_.job, view_.shape, row, rows);
    if (mix == kAllMasked) return;
    if (mix == kUniform) factors_.repeat(rows);
    const int64_t begin = view_.begin_of(row), live = factors_.list_live(rows, rows_ahead<S, 1>(width));
    const float* threshold = view_.job.rows.threshold + view_.shape.start + row;
    view_.update.update_rows(
        begin, view_.gradient.stored(begin),
        {live, width, factors_.live, factors_.decay, factors_.fade, threshold, view_.sums_of(row)});
    if (mix == kMixed && factors_.any_ends) view_.end_rows(factors_.fade, begin, rows, width, 1);
  }

  const ChunkView<S, Update>& view_;
  ColumnFactors<C> factors_;
};

SPARSEKERN_END_ISA
#endif
