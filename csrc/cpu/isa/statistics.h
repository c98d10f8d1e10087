// The statistics of rows, of columns and of single elements. A loop adds sixteen elements at a time before it updates
// them.
#pragma once

#include "row_lanes.h"

SPARSEKERN_BEGIN_ISA

// Elements of a block whose statistics are taken before its update. Four arrays of 512 floats stay in the first-level
// cache between the two loops; with 4096 they do not, and the step is a quarter slower.
constexpr int64_t kBlock = 512;

// Shortest row that is summed in lanes; shorter rows are summed column by column.
constexpr int64_t kLongRow = 8;

// Prefetches into the second-level cache: memory that is needed in several hundred nanoseconds or later.
inline void prefetch_far(const void* at) {
  __builtin_prefetch(at, 0, 2);
}

// The last n < 16 elements, at an address from which sixteen can be read: in place if at least sixteen elements are
// `readable`, else in a copy.
template <class T>
struct Last {
  T copy[kLanes];
  const T* at;

  Last(const T* from, int64_t n, int64_t readable) : at(from) {
    if (readable >= kLanes) return;
    for (int64_t l = 0; l < n; ++l) copy[l] = from[l];
    at = copy;
  }
};

// Prefetch distance in elements. Below about 2 KB prefetching gains nothing; 2 to 3 KB is up to 10 % faster than 400
// bytes. A loop over fewer arrays is shorter and needs a larger distance.
template <class S, int kArrays>
constexpr int64_t kPrefetchDistance = (kArrays < 3 ? 3072 : 2304) / sizeof(S);

struct Empty {};

struct NoStatistics {
  int64_t readable;
  bool first;

  Empty begin() const { return {}; }
  void end(Empty) const {}

  template <class Vector>
  SPARSEKERN_INLINE void add_vector(Empty, int64_t, Vector, Vector) const {}
};

// Statistics of one row with one threshold. `readable` is the number of elements that may be read.
template <class S>
struct RowStatistics {
  using Local = RowLanes<S>;
  Local* sums;
  int64_t readable;
  Same<typename Compute<S>::Type> threshold;
  bool first = false;  // the sums are not there yet

  Local begin() const { return first ? Local() : *sums; }
  void end(const Local& local) const { *sums = local; }
  template <class D>
  SPARSEKERN_INLINE void add(Local& local, int64_t, const S* w, const D* d) const {
    local.add(w, d, threshold, 0);
  }
  template <class Vector>
  SPARSEKERN_INLINE void add_vector(Local& local, int64_t, Vector w, Vector d) const {
    local.add_vector(w, d, threshold.vector(0));
  }
  template <class D>
  SPARSEKERN_INLINE void add_last(Local& local, int64_t i, const S* w, const D* d, int64_t n) const {
    const Last<S> last_w(w, n, readable - i);
    const Last<D> last_d(d, n, readable - i);
    local.add_first(last_w.at, last_d.at, n, threshold, 0);
  }
};

// Whether statistics are those of contiguous rows, whose blocks follow each other.
template <class Statistics>
constexpr bool kOfRows = false;
template <class S>
constexpr bool kOfRows<RowStatistics<S>> = true;

// None: the statistics of these rows were taken before.
struct TakenStatistics : NoStatistics {};
template <>
constexpr bool kOfRows<TakenStatistics> = true;

// Statistics of columns with a threshold each. Every column has a lane.
template <class C>
struct ColumnStatistics {
  using Local = Empty;
  Lanes<C>* sums;
  int64_t readable;
  Each<C> threshold;

  Local begin() const { return {}; }
  void end(Local) const {}
  template <class S, class D>
  SPARSEKERN_INLINE void add(Local, int64_t i, const S* w, const D* d) const {
    sums[i / kLanes].add(w, d, threshold, i);
  }
  template <class Vector>
  SPARSEKERN_INLINE void add_vector(Local, int64_t i, Vector w, Vector d) const {
    sums[i / kLanes].add_vector(w, d, threshold.vector(i));
  }
  template <class S, class D>
  SPARSEKERN_INLINE void add_last(Local, int64_t i, const S* w, const D* d, int64_t n) const {
    const Last<S> last_w(w, n, readable - i);
    const Last<D> last_d(d, n, readable - i);
    sums[i / kLanes].add_first(last_w.at, last_d.at, n, threshold, i);
  }
};

// The same for rows that are made of quads (four neighbouring columns). The four sums of a quad are side by side.
template <class C, class Threshold>
struct QuadStatistics {
  using Local = Empty;
  C* sums;
  int64_t readable;
  Threshold threshold;

  Local begin() const { return {}; }
  void end(Local) const {}
  template <class Vector>
  SPARSEKERN_INLINE void add_vector(Local, int64_t i, Vector w, Vector d) const {
    Lanes<C> lanes;
    lanes.add_vector(w, d, threshold.vector(i));
    lanes.add_quads_to(sums + i);
  }
  template <class S, class D>
  SPARSEKERN_INLINE void add(Local, int64_t i, const S* w, const D* d) const {
    Lanes<C> lanes;
    lanes.add(w, d, threshold, i);
    lanes.add_quads_to(sums + i);
  }
  template <class S, class D>
  SPARSEKERN_INLINE void add_last(Local, int64_t i, const S* w, const D* d, int64_t n) const {
    const Last<S> last_w(w, n, readable - i);
    const Last<D> last_d(d, n, readable - i);
    Lanes<C> lanes;
    lanes.add_first(last_w.at, last_d.at, n, threshold, i);
    lanes.add_quads_to(sums + i);
  }
};

// Statistics of rows of one element. The four sums of each are stored at once, side by side.
template <class C>
struct SingleStatistics {
  using Local = Empty;
  float* sums;
  int64_t count, readable;
  Each<C> threshold;

  Local begin() const { return {}; }
  void end(Local) const {}
  template <class Vector>
  SPARSEKERN_INLINE void add_vector(Local, int64_t i, Vector w, Vector d) const {
    Lanes<C> lanes;
    lanes.add_vector(w, d, threshold.vector(i));
    store_singles(lanes, count - i, sums + i * kSums);
  }
  template <class S, class D>
  SPARSEKERN_INLINE void add(Local, int64_t i, const S* w, const D* d) const {
    Lanes<C> lanes;
    lanes.add(w, d, threshold, i);
    store_singles(lanes, kLanes, sums + i * kSums);
  }
  template <class S, class D>
  SPARSEKERN_INLINE void add_last(Local, int64_t i, const S* w, const D* d, int64_t n) const {
    const Last<S> last_w(w, n, readable - i);
    const Last<D> last_d(d, n, readable - i);
    Lanes<C> lanes;
    lanes.add_first(last_w.at, last_d.at, n, threshold, i);
    store_singles(lanes, n, sums + i * kSums);
  }
};

// Whether a loop still has to take the statistics.
template <class Statistics>
constexpr bool kTakes = true;
template <>
constexpr bool kTakes<NoStatistics> = false;
template <>
constexpr bool kTakes<TakenStatistics> = false;

// Adds n elements to the statistics, unless they are taken already or not wanted.
template <class S, class D, class Statistics>
SPARSEKERN_INLINE void accumulate_statistics(int64_t n, const S* w, const D* d, Statistics statistics) {
  if constexpr (kTakes<Statistics>) {
    auto local = statistics.begin();
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) statistics.add(local, i, w + i, d + i);
    if (i < n) statistics.add_last(local, i, w + i, d + i, n - i);
    statistics.end(local);
  }
}

// The sums of a row of n elements, of which at least n are `readable`.
template <class S, class D>
SPARSEKERN_INLINE RowLanes<S> sums_of_row(int64_t n, const S* w, const D* d, Same<typename Compute<S>::Type> threshold,
                                          int64_t readable) {
  RowLanes<S> sums;
  accumulate_statistics(n, w, d, RowStatistics<S>{&sums, readable, threshold});
  return sums;
}

SPARSEKERN_END_ISA
