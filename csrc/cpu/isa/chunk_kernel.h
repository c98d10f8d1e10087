// The kernel of one chunk: selects the loop for its rows (row_runs.h, long_rows.h or column_tiles.h).
#pragma once

#include "../../update.h"
#include "column_tiles.h"
#include "long_rows.h"
#include "row_runs.h"

SPARSEKERN_BEGIN_ISA

template <class S, class Update>
class ChunkKernel {
 public:
  using C = typename Compute<S>::Type;

  ChunkKernel(const Job& job, const Chunk& chunk) : view_(job, chunk) {}

  void run() const {
    if (view_.shape.start < 0) return untracked();
#if defined(__AVX2__)
    if (RowRuns<S, Update>::takes(view_)) return RowRuns<S, Update>(view_).run();
#endif
    if (view_.shape.outer == 1 && view_.shape.inner >= kWideRow) return LongRows<S, Update>(view_).run();
    ColumnTiles<S, Update>(view_).run();
  }

 private:
  // A tensor that is not tracked: one row without statistics, fade or mask.
  void untracked() const {
    const C decay = decay_of<C>(view_.job.hyper, 0);
    const int64_t step = view_.gradient.longest(), end = view_.chunk.inner_end;
    for (int64_t at = view_.chunk.inner_begin, n; at < end; at += n) {
      n = minimum(step, end - at);
      view_.gradient.template with_gradient<true>(at, n, nullptr, [&](const auto* d) {
        view_.update.update(at, n, d, Same<C>{decay}, NoFade(), NoStatistics());
      });
    }
  }

  const ChunkView<S, Update> view_;
};

SPARSEKERN_END_ISA
