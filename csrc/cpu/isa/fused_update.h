// Fused loops: they take the statistics of sixteen elements (with AVX-512 of a register of elements in their storage
// type), update them, and continue with the next. The sums are computed while the divider units work on the elements
// before.
#pragma once

#include "registers.h"
#include "row_factors.h"
#include "vector_update.h"

SPARSEKERN_BEGIN_ISA

// Whether there is a fused loop for elements of type S, gradients of type D and a kind of statistics.
template <class S, class D, class Statistics>
#if defined(__AVX512F__)
constexpr bool kFuses = kHasRegisters<S> && __is_same(D, S);
#elif defined(__AVX2__)
constexpr bool kFuses = kTakes<Statistics> && (__is_same(S, float) || (__is_same(S, BFloat16) && kOfRows<Statistics>));
#else
constexpr bool kFuses = false;
#endif

// Whether the loops over rows and columns take gradients in their storage type.
template <class S>
constexpr bool kTakesStored = kFuses<S, S, RowStatistics<S>>;

// The prefetch distance in rows of `width` elements.
template <class S, int kArrays>
constexpr int64_t rows_ahead(int64_t width) {
  return (kPrefetchDistance<S, kArrays> + width - 1) / width;
}

// Whether a loop runs through contiguous rows, and what divides their width: a vector or sixteen elements.
template <class S>
constexpr bool kFusesRows = kHasRegisters<S> || (kVectorBytes == 32 && (__is_same(S, float) || kEveryOther<S>));
template <class S>
constexpr int64_t kRowUnit = kHasRegisters<S> ? 1
                             : kEveryOther<S> ? kLanes
                                              : Vectors<float>::kWidth;

// The live rows of a tile, with their factors and thresholds.
struct RowRun {
  // `live` lists the indices in the tile of `count` rows of `width` elements, then padding: prefetched, never used.
  int64_t count, width;
  const int32_t* live;
  const float *decay, *fade, *threshold;  // one for each row of the tile
  float* sums;                            // four for each
};

#if defined(__AVX512F__)
// Statistics and update of the first `parts` vectors of one register, which starts at element i.
template <int part, class S, int kArrays, class Statistics, class Local, class Update>
SPARSEKERN_INLINE void fused_register(int64_t parts, int64_t i, const typename Registers<S>::Whole (&old)[kArrays],
                                      typename Registers<S>::Whole d, Statistics statistics, Local& local,
                                      Update update,
                                      typename Registers<S>::Rounded (&rounded)[kArrays][Registers<S>::kVectors]) {
  using R = Registers<S>;
  using Vector = typename R::Vector;
  if constexpr (part < R::kVectors) {
    if (part >= parts) return;
    const int64_t at = i + part * Vectors<float>::kWidth;
    Vector from[kArrays], updated[kArrays];
#pragma GCC unroll 4
    for (int a = 0; a < kArrays; ++a) from[a] = R::template vector<part>(old[a]);
    const Vector vector_d = R::template vector<part>(d);
    statistics.add_vector(local, at, from[0], vector_d);
    update(at, from, vector_d, updated);
#pragma GCC unroll 4
    for (int a = 0; a < kArrays; ++a) rounded[a][part] = R::round_number(updated[a]);
    // One comparison finds NaN in two vectors.
    bool nan = R::any_nan(updated[0], updated[kArrays - 1]);
    if constexpr (kArrays == 3) nan |= R::any_nan(updated[1], updated[1]);
    if (__builtin_expect(nan, 0)) {
#pragma GCC unroll 4
      for (int a = 0; a < kArrays; ++a) rounded[a][part] = R::round(updated[a]);
    }
    fused_register<part + 1, S>(parts, i, old, d, statistics, local, update, rounded);
  }
}

// Updates n elements of kArrays arrays, of which the first holds the weights, one register at a time. `update(i, old,
// d, updated)` gets the vectors of the arrays and of the gradient at element i.
//
// The next registers are loaded before these are stored: a load waits for an earlier store whose address differs in the
// upper bits only, and the arrays of a tensor often have such addresses.
template <class S, int kArrays, class Decay, class Fade, class Statistics, class Update>
SPARSEKERN_INLINE void fused_update(int64_t n, S* const (&arrays)[kArrays], const S* __restrict ds, Decay decay,
                                    Fade fade, Statistics statistics, Update step) {
  using R = Registers<S>;
  constexpr int64_t kElements = R::kElements;
  const auto update = [=](int64_t i, const typename R::Vector(&from)[kArrays], typename R::Vector vector_d,
                          typename R::Vector(&updated)[kArrays])
                          SPARSEKERN_ALWAYS { step(i, decay, fade, from, vector_d, updated); };
  auto local = statistics.begin();
  typename R::Whole old[kArrays], d;
  typename R::Rounded rounded[kArrays][R::kVectors] = {};
  const int64_t whole = n - n % kElements;
  int64_t i = 0;
  if (whole > 0) {
    d = R::load(ds);
#pragma GCC unroll 4
    for (int a = 0; a < kArrays; ++a) old[a] = R::load(arrays[a]);
  }
  for (int64_t next = 0; i < whole; i = next) {
    // The last iteration loads its own elements again.
    next = i + kElements;
    const int64_t from = next < whole ? next : i;
    __builtin_prefetch(ds + i + kPrefetchDistance<S, kArrays>);
#pragma GCC unroll 4
    for (int a = 0; a < kArrays; ++a) __builtin_prefetch(arrays[a] + i + kPrefetchDistance<S, kArrays>);
    fused_register<0, S>(R::kVectors, i, old, d, statistics, local, update, rounded);
    d = R::load(ds + from);
#pragma GCC unroll 4
    for (int a = 0; a < kArrays; ++a) old[a] = R::load(arrays[a] + from);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
#pragma GCC unroll 4
    for (int a = 0; a < kArrays; ++a) R::store(R::join(rounded[a]), arrays[a] + i);
  }
  if (const int64_t left = n - i; left > 0) {
    d = R::load_first(ds + i, left);
#pragma GCC unroll 4
    for (int a = 0; a < kArrays; ++a) old[a] = R::load_first(arrays[a] + i, left);
    const int64_t parts = (left + Vectors<float>::kWidth - 1) / Vectors<float>::kWidth;
    fused_register<0, S>(parts, i, old, d, statistics, local, update, rounded);
#pragma GCC unroll 4
    for (int a = 0; a < kArrays; ++a) R::store_first(R::join(rounded[a]), arrays[a] + i, left);
  }
  statistics.end(local);
}

// The same for a run of rows of at least half a vector each, with statistics for each row. Loads continue across the
// ends of rows, so that every load is ahead of the stores before it and waits for none of them. The prefetch follows
// the order of the rows, because memory between them may belong to masked rows.
template <bool /* kDecaysGradient: for AVX2 */, class S, int kArrays, class Update>
SPARSEKERN_INLINE void fused_update_rows(const RowRun& rows, S* const (&arrays)[kArrays], const S* __restrict ds,
                                         Update update) {
  using R = Registers<S>;
  constexpr int64_t kElements = R::kElements;
  const int64_t last = (rows.width - 1) / kElements * kElements, left = rows.width - last;
  const int64_t parts = (left + Vectors<float>::kWidth - 1) / Vectors<float>::kWidth;
  const int64_t head = last > 0 ? kElements : left;
  typename R::Whole old[kArrays], d;
  typename R::Rounded rounded[kArrays][R::kVectors] = {};
  const auto load = [&](int64_t at, int64_t n) SPARSEKERN_ALWAYS {
    d = R::load_first(ds + at, n);
#pragma GCC unroll 4
    for (int a = 0; a < kArrays; ++a) old[a] = R::load_first(arrays[a] + at, n);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
  };
  const auto prefetch = [&](int64_t at) SPARSEKERN_ALWAYS {
    __builtin_prefetch(ds + at);
#pragma GCC unroll 4
    for (int a = 0; a < kArrays; ++a) __builtin_prefetch(arrays[a] + at);
  };
  const int32_t* const ahead = rows.live + rows_ahead<S, kArrays>(rows.width);
  load(rows.live[0] * rows.width, head);
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t row = rows.live[r], begin = row * rows.width, gap = ahead[r] * rows.width - begin;
    const Same<float> decay = {rows.decay[row]}, threshold = {rows.threshold[row]};
    const SameFade<float> fade = {rows.fade[row]};
    Lanes<float> sums;
    const RowStatistics<S> statistics = {nullptr, 0, threshold};
    const auto of_row = [=](int64_t i, const typename R::Vector(&from)[kArrays], typename R::Vector vector_d,
                            typename R::Vector(&updated)[kArrays])
                            SPARSEKERN_ALWAYS { update(i, decay, fade, from, vector_d, updated); };
    for (int64_t i = begin; i < begin + last; i += kElements) {
      prefetch(i + gap);
      fused_register<0, S>(R::kVectors, i, old, d, statistics, sums, of_row, rounded);
      const int64_t from = i + kElements;
      load(from, from < begin + last ? kElements : left);
#pragma GCC unroll 4
      for (int a = 0; a < kArrays; ++a) R::store(R::join(rounded[a]), arrays[a] + i);
    }
    prefetch(begin + last + gap);
    fused_register<0, S>(parts, begin + last, old, d, statistics, sums, of_row, rounded);
    // After the last row this loads that row again.
    load(r + 1 < rows.count ? rows.live[r + 1] * rows.width : begin, head);
#pragma GCC unroll 4
    for (int a = 0; a < kArrays; ++a) R::store_first(R::join(rounded[a]), arrays[a] + begin + last, left);
    store_row(sums, rows.sums + row * kSums);
  }
}
#elif defined(__AVX2__)
// Updates n elements of kArrays arrays, of which the first holds the weights. The sums leave no registers for loading
// elements ahead, so this loop relies on its prefetches. Two loops take 1.1 to 1.4 times as long (AMD EPYC, Zen 5), and
// three times as long for the four columns of transposed convolutions.
template <class S, class D, int kArrays, class Decay, class Fade, class Statistics, class Update>
SPARSEKERN_INLINE void fused_update(int64_t n, S* const (&arrays)[kArrays], const D* ds, Decay decay, Fade fade,
                                    Statistics statistics, Update step) {
  constexpr int64_t kAhead = kPrefetchDistance<S, kArrays>;
  const auto update = [=](auto place, const auto& old, auto d, auto& updated)
                          SPARSEKERN_ALWAYS { step(place, decay, fade, old, d, updated); };
  auto local = statistics.begin();
  const auto sixteen = [&](int64_t i) SPARSEKERN_ALWAYS {
    S* at[kArrays];
#pragma GCC unroll 4
    for (int a = 0; a < kArrays; ++a) at[a] = arrays[a] + i;
    statistics.add(local, i, at[0], ds + i);
    update_sixteen(i, at, ds + i, update);
  };
  int64_t i = 0;
  for (; i + kLine<S> <= n; i += kLine<S>) {
    __builtin_prefetch(ds + i + kAhead);
#pragma GCC unroll 4
    for (int a = 0; a < kArrays; ++a) __builtin_prefetch(arrays[a] + i + kAhead);
#pragma GCC unroll 2
    for (int64_t in_line = 0; in_line < kLine<S>; in_line += kLanes) sixteen(i + in_line);
  }
  if constexpr (kLine<S> > kLanes)
    for (; i + kLanes <= n; i += kLanes) sixteen(i);
  if (i < n) statistics.add_last(local, i, arrays[0] + i, ds + i, n - i);
  statistics.end(local);
  if (i < n) update_last(n - i, i, arrays, ds, update);
}

// The same for a run of rows of whole vectors, with statistics for each row. The prefetch follows the order of the
// rows: a long row prefetches its own elements, then those of the next live row.
template <bool kDecaysGradient, class S, int kArrays, class Update>
SPARSEKERN_INLINE void fused_update_rows(const RowRun& rows, S* const (&arrays)[kArrays], const S* ds, Update step) {
  constexpr int64_t kAhead = kPrefetchDistance<S, kArrays>;
  const int64_t width = rows.width, whole = width / kLanes * kLanes, near = width > kAhead ? width - kAhead : 0;
  const int32_t* const ahead = rows.live + rows_ahead<S, kArrays>(width);
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t row = rows.live[r], begin = row * width;
    const int64_t gap = ahead[r] * width - begin - near;
    const Same<float> threshold = {rows.threshold[row]}, decay = {rows.decay[row]};
    RowLanes<S> sums;
    const auto update_row = [&](auto of_row, auto fade) SPARSEKERN_ALWAYS {
      const auto update = [=](auto place, const auto& old, auto d, auto& updated)
                              SPARSEKERN_ALWAYS { step(place, of_row, fade, old, d, updated); };
      S* at[kArrays];
      const auto go_to = [&](int64_t i, int64_t distance) SPARSEKERN_ALWAYS {
        __builtin_prefetch(ds + i + distance);
#pragma GCC unroll 4
        for (int a = 0; a < kArrays; ++a) {
          at[a] = arrays[a] + i;
          __builtin_prefetch(at[a] + distance);
        }
      };
      for (int64_t i = begin; i < begin + whole; i += kLanes) {
        go_to(i, i < begin + near ? kAhead : gap);
        sums.add(at[0], ds + i, threshold, i);
        update_sixteen(i, at, ds + i, update);
      }
      if constexpr (kRowUnit<S> < kLanes) {
        if (whole == width) return;
        const int64_t last = begin + whole;
        go_to(last, gap);
        sums.add_first_vector(at[0], ds + last, threshold);
        update_first_vector(last, at, ds + last, update);
      }
    };
    if (rows.fade[row] != 1) {
      update_row(decay, SameFade<float>{rows.fade[row]});
    } else if constexpr (kDecaysGradient) {
      with_known_decay(decay, [&](auto known) SPARSEKERN_ALWAYS { update_row(known, NoFade()); });
    } else {
      update_row(decay, NoFade());
    }
    store_row(sums, rows.sums + row * kSums);
  }
}
#endif

SPARSEKERN_END_ISA
