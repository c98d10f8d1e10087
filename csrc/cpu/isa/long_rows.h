// The loop for contiguous rows that are long enough to be updated one by one. Masked rows are skipped.
#pragma once

#include "chunk_view.h"

SPARSEKERN_BEGIN_ISA

// Shortest row that is updated alone. Shorter rows are updated together with their neighbours.
constexpr int64_t kWideRow = 64;

// Elements to prefetch ahead if masked rows are skipped: they cover the latency of memory.
constexpr int64_t kGap = 1024;

template <class S, class Update>
class LongRows {
 public:
  using C = typename Compute<S>::Type;

  explicit LongRows(const ChunkView<S, Update>& view) : view_(view) {}

  void run() const {
    Ahead ahead = {view_.chunk.row_begin, some_masked() ? 0 : INT64_MAX};
    for (int64_t row = view_.chunk.row_begin, next; row < view_.chunk.row_end; row = next) {
      const Factors<C> factors = factors_of<C>(view_.job, view_.shape, row);
      next = end_of_run(row, factors);
      const int64_t begin = view_.begin_of(row), n = view_.end_of(next - 1) - begin;
      if (factors.fade == C(kMasked)) {
        view_.update.masked(begin, n);
        continue;
      }
      ahead.elements -= n;
      while (ahead.elements < kGap && ahead.row < view_.chunk.row_end) prefetch_next(ahead);
      update_rows(row, next, factors);
      if (factors.fade == 0) view_.update.end(begin, n);
    }
  }

 private:
  // Hardware prefetchers follow memory that is read without gaps, and skipped rows interrupt them. So this loop
  // prefetches the next live rows itself: `elements` elements so far, up to row `row`. It prefetches into the
  // second-level cache. The first-level cache allows too few requests at a time: with it rows of 160 elements took 50 %
  // longer.
  struct Ahead {
    int64_t row, elements;
  };

  void prefetch_next(Ahead& ahead) const {
    const int64_t row = ahead.row++;
    if (view_.job.rows.countdown[view_.shape.start + row] == 0) return;
    const int64_t begin = view_.begin_of(row), n = view_.end_of(row) - begin;
    constexpr int64_t kLine = 64 / sizeof(S);
    for (int64_t at = begin; at < begin + minimum(n, kGap); at += kLine) {
      if (Update::kReadsGrad) prefetch_far(view_.gradient.stored(at));
      view_.update.prefetch(at);
    }
    ahead.elements += n;
  }

  bool some_masked() const {
    const int32_t* countdown = view_.job.rows.countdown + view_.shape.start;
    int32_t some = 0;
    for (int64_t row = view_.chunk.row_begin; row < view_.chunk.row_end; ++row) some |= countdown[row] == 0;
    return some;
  }

  // The end of the rows from `row` on that have the same factors and fit a block together. An update of several rows
  // takes less time than as many updates. Fused loops take one row at a time.
  int64_t end_of_run(int64_t row, const Factors<C>& factors) const {
    const int64_t n = view_.end_of(row) - view_.begin_of(row);
    int64_t next = row + 1;
    if (kHasRegisters<S> || view_.update.fuses_statistics() || n != view_.shape.inner) return next;
    while (next < view_.chunk.row_end && (next + 1 - row) * n <= kBlock &&
           factors_of<C>(view_.job, view_.shape, next) == factors)
      ++next;
    return next;
  }

  void update_rows(int64_t row, int64_t end, const Factors<C>& factors) const {
    if constexpr (!kHasRegisters<S>) {
      if (end > row + 1) return update_run(row, end, factors);
    }
    const int64_t begin = view_.begin_of(row), n = view_.end_of(row) - begin;
    if (!view_.statistics) return update_row(begin, n, factors, NoStatistics());
    RowLanes<S> sums;
    update_row(begin, n, factors, RowStatistics<S>{&sums, view_.readable_from(begin), {view_.threshold_of(row)}});
    store_row(sums, view_.sums_of(row));
  }

  // Takes the statistics of each row, then updates all of them.
  void update_run(int64_t row, int64_t end, const Factors<C>& factors) const {
    const int64_t begin = view_.begin_of(row), width = view_.shape.inner;
    view_.gradient.template with_gradient<true>(begin, (end - row) * width, nullptr, [&](const auto* d) {
      for (int64_t r = row; view_.statistics && r < end; ++r) {
        const int64_t i = (r - row) * width;
        RowLanes<S> sums;
        const RowStatistics<S> of_row = {&sums, view_.readable_from(begin + i), {view_.threshold_of(r)}};
        accumulate_statistics(width, view_.weight + begin + i, d + i, of_row);
        store_row(sums, view_.sums_of(r));
      }
      view_.update.update(begin, (end - row) * width, d, Same<C>{factors.decay}, SameFade<C>{factors.fade},
                          TakenStatistics());
    });
  }

  template <class Statistics>
  void update_row(int64_t begin, int64_t count, const Factors<C>& factors, Statistics statistics) const {
    const int64_t step = view_.gradient.longest();
    for (int64_t at = begin, n; at < begin + count; at += n) {
      n = minimum(step, begin + count - at);
      statistics.readable = view_.readable_from(at);
      view_.gradient.template with_gradient<true>(at, n, nullptr, [&](const auto* d) {
        view_.update.update(at, n, d, Same<C>{factors.decay}, SameFade<C>{factors.fade}, statistics);
      });
    }
  }

  const ChunkView<S, Update>& view_;
};

SPARSEKERN_END_ISA
