// The loop for contiguous rows that are long enough to be updated one by one. Masked rows are skipped.
#pragma once

#include "chunk_view.h"
#include "fused_update.h"

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
    if (factors.fade != 1) return update_fading(row, end, factors);
    if constexpr (!kHasRegisters<S>) {
      if (end > row + 1) return update_run(row, end, factors);
    }
    const int64_t begin = view_.begin_of(row), n = view_.end_of(row) - begin;
    if constexpr (Update::kReadsGrad) {
      if (view_.statistics) return update_row_with_sums(row, begin, n, factors);
    }
    update_row(begin, n, factors, NoStatistics());
  }

  void update_row_with_sums(int64_t row, int64_t begin, int64_t n, const Factors<C>& factors) const {
    // Clearing the memory of the sums would take as long as a short row.
    union Sums {
      RowLanes<S> lanes;
      Sums() {}
    } sums;
    update_row(begin, n, factors, RowStatistics<S>{&sums.lanes, 0, {view_.threshold_of(row)}});
    store_row(sums.lanes, view_.sums_of(row));
  }

  // Takes the statistics of each row, then updates all of them.
  void update_run(int64_t row, int64_t end, const Factors<C>& factors) const {
    const int64_t begin = view_.begin_of(row), width = view_.shape.inner;
    view_.gradient.template with_gradient<true>(begin, (end - row) * width, nullptr, [&](const auto* d) {
      for (int64_t r = row; view_.statistics && r < end; ++r) {
        const int64_t i = (r - row) * width;
        const Same<C> threshold = {view_.threshold_of(r)};
        const int64_t readable = view_.readable_from(begin + i);
        store_row(sums_of_row<S>(width, view_.weight + begin + i, d + i, threshold, readable), view_.sums_of(r));
      }
      view_.update.update(begin, (end - row) * width, d, Same<C>{factors.decay}, NoFade(), TakenStatistics());
    });
  }

  // Few rows fade at a time. They use the loops of column_tiles.h, which read the factors of each element.
  void update_fading(int64_t row, int64_t end, const Factors<C>& factors) const {
    C decay[kBlock + kLanes], fade[kBlock + kLanes];
    for (int64_t i = 0; i < kBlock + kLanes; ++i) {
      decay[i] = factors.decay;
      fade[i] = factors.fade;
    }
    for (int64_t r = row; r < end; ++r) {
      RowLanes<S> sums;
      for (int64_t at = view_.begin_of(r), n; at < view_.end_of(r); at += n) {
        n = minimum(kBlock, view_.end_of(r) - at);
        view_.gradient.template with_gradient<kTakesStored<S>>(at, n, nullptr, [&](const auto* d) {
          const RowStatistics<S> of_row = {&sums, view_.readable_from(at), {view_.threshold_of(r)}};
          if (view_.statistics) accumulate_statistics(n, view_.weight + at, d, of_row);
          view_.update.update(at, n, d, Each<C>{decay}, RowFades<C, Each<C>>{{fade}}, NoStatistics());
        });
      }
      if (view_.statistics) store_row(sums, view_.sums_of(r));
    }
  }

  template <class Statistics>
  void update_row(int64_t begin, int64_t count, const Factors<C>& factors, Statistics statistics) const {
    const int64_t step = view_.gradient.longest();
    for (int64_t at = begin, n; at < begin + count; at += n) {
      n = minimum(step, begin + count - at);
      statistics.readable = view_.readable_from(at);
      statistics.first = at == begin;
      view_.gradient.template with_gradient<true>(at, n, nullptr, [&](const auto* d) {
        view_.update.update(at, n, d, Same<C>{factors.decay}, NoFade(), statistics);
      });
    }
  }

  const ChunkView<S, Update>& view_;
};

SPARSEKERN_END_ISA
