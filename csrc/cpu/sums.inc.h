// The four sums of a row: count, dot, grad_sq, weight_sq.

constexpr int kSums = 4;

// Elements looked at before they are updated: four arrays of this many floats stay in a first-level cache
// between the two passes. 4096 leaves it and costs a quarter of the speed.
constexpr int64_t kBlock = 512;

// Adds the last n < 16 elements of a row or tile. Up to `readable` elements may be looked at.
template <class S, class C, class Threshold>
SPARSEKERN_INLINE void add_last(Lanes<C>& sums, const S* w, const C* d, int64_t n, int64_t readable,
                                Threshold threshold) {
  S last_w[kLanes];
  C last_d[kLanes];
  if (readable < kLanes) {
    for (int64_t l = 0; l < n; ++l) last_w[l] = w[l];
    for (int64_t l = 0; l < n; ++l) last_d[l] = d[l];
    w = last_w;
    d = last_d;
  }
  sums.add_first(w, d, n, threshold);
}

// Adds n elements of one row; its blocks start at multiples of 16.
template <class S, class C>
SPARSEKERN_INLINE void add_row(Lanes<C>& sums, const S* w, const C* d, int64_t n, int64_t readable, C threshold) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sums.add(w + i, d + i, threshold);
  if (i < n) add_last(sums, w + i, d + i, n - i, readable - i, threshold);
}

// How far ahead of the arithmetic memory is asked for, in elements. The statistics lengthen the loop, and with it the
// time that the machine's own prefetcher needs to see that it goes on.
constexpr int64_t kAhead = 128;

// Whether a loop over elements of one row also takes their statistics.
struct NoStatistics {};

template <class C>
struct RowStatistics {
  Lanes<C>* sums;
  int64_t readable;
  C threshold;
};

// Calls element(i) for every i below n, after it has looked at the parameter and gradient there: sixteen at a time, so that
// the additions run while the dividers are busy with the elements before.
template <class S, class C, class Prefetch, class Element>
SPARSEKERN_INLINE void for_elements(int64_t n, const S*, const C*, NoStatistics, Prefetch, Element element) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) element(i);
}

template <class S, class C, class Prefetch, class Element>
SPARSEKERN_INLINE void for_elements(int64_t n, const S* w, const C* d, RowStatistics<C> row, Prefetch prefetch,
                                    Element element) {
  Lanes<C> sums = *row.sums;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    prefetch(i + kAhead);
    sums.add(w + i, d + i, row.threshold);
#pragma GCC ivdep
    for (int64_t l = 0; l < kLanes; ++l) element(i + l);
  }
  if (i < n) {
    add_row(sums, w + i, d + i, n - i, row.readable - i, row.threshold);
#pragma GCC ivdep
    for (; i < n; ++i) element(i);
  }
  *row.sums = sums;
}

// count, dot, grad_sq, weight_sq side by side.
template <class C>
struct FourOf {
  typedef C Type __attribute__((vector_size(kSums * sizeof(C))));
};

template <class C>
inline void store_four(const typename FourOf<C>::Type& four, float* out) {
  for (int s = 0; s < kSums; ++s) out[s] = float(four[s]);
}

// From four lanes of each sum to the four sums of each lane.
template <class C>
inline void transpose(const typename FourOf<C>::Type (&sums)[kSums], typename FourOf<C>::Type (&lanes)[4]) {
  for (int l = 0; l < 4; ++l) lanes[l] = typename FourOf<C>::Type{sums[0][l], sums[1][l], sums[2][l], sums[3][l]};
}

// Folds the lanes (16 to 4, transpose, 4 to 1) and stores the four sums side by side.
template <class C>
inline void store_row(const Lanes<C>& sums, float* out) {
  using Four = typename FourOf<C>::Type;
  C lanes[kSums][kLanes];
  sums.store(lanes[0], lanes[1], lanes[2], lanes[3]);
  Four folded[kSums], lane[4];
  for (int s = 0; s < kSums; ++s) {
    Four part[kLanes / 4];
    __builtin_memcpy(part, lanes[s], sizeof(part));
    folded[s] = (part[0] + part[2]) + (part[1] + part[3]);
  }
  transpose<C>(folded, lane);
  store_four<C>((lane[0] + lane[2]) + (lane[1] + lane[3]), out);
}

// Columns whose sums are kept at a time.
constexpr int64_t kTile = 2048;

// Sums of short or interleaved rows, folded at the end: one lane per column of a tile, or the four sums of four
// neighbouring columns where a row is made of such (quads), which is a quarter of the memory.
template <class C>
struct Columns {
  bool quads;
  union {
    Lanes<C> sums[kTile / kLanes];
    C quad_sums[kTile];
  };

  Columns() {}

  void clear(int64_t n, int64_t width) {
    quads = width % 4 == 0;
    __builtin_memset(sums, 0, (n + kLanes - 1) / kLanes * (quads ? kLanes * sizeof(C) : sizeof(Lanes<C>)));
  }
};

// Adds n elements to the columns from `column` on, a multiple of 16.
template <class S, class C>
inline void add_columns(Columns<C>& columns, int64_t column, const S* __restrict w, const C* __restrict d, int64_t n,
                        int64_t readable, const C* __restrict threshold) {
  int64_t i = 0;
  if (columns.quads) {
    C* __restrict sums = columns.quad_sums + column;
    for (; i + kLanes <= n; i += kLanes) {
      Lanes<C> lanes;
      lanes.add(w + i, d + i, threshold + i);
      lanes.add_quads_to(sums + i);
    }
    if (i == n) return;
    Lanes<C> lanes;
    add_last(lanes, w + i, d + i, n - i, readable - i, threshold + i);
    lanes.add_quads_to(sums + i);
  } else {
    Lanes<C>* __restrict sums = columns.sums + column / kLanes;
    for (; i + kLanes <= n; i += kLanes) sums++->add(w + i, d + i, threshold + i);
    if (i < n) add_last(*sums, w + i, d + i, n - i, readable - i, threshold + i);
  }
}

// The four sums of each of sixteen columns.
template <class C>
inline void columns_of(const Lanes<C>& lanes, typename FourOf<C>::Type (&sums)[kLanes]) {
  using Four = typename FourOf<C>::Type;
  C lane[kSums][kLanes];
  lanes.store(lane[0], lane[1], lane[2], lane[3]);
  for (int part = 0; part < kLanes; part += 4) {
    Four four[kSums], column[4];
    for (int s = 0; s < kSums; ++s) __builtin_memcpy(&four[s], lane[s] + part, sizeof(Four));
    transpose<C>(four, column);
    for (int l = 0; l < 4; ++l) sums[part + l] = column[l];
  }
}

// Folds `width` neighbouring columns into each of `rows` rows, in their order.
template <class C>
inline void store_columns(const Columns<C>& columns, int64_t rows, int64_t width, float* __restrict out) {
  using Four = typename FourOf<C>::Type;
  const int64_t a_row = columns.quads ? width / 4 : width, n = rows * a_row;
  Four sums[kLanes], total = {};
  int64_t left = a_row;
  for (int64_t i = 0; i < n; ++i) {
    if (i % kLanes == 0) {
      if (columns.quads) {
        __builtin_memcpy(sums, columns.quad_sums + i * 4, sizeof(sums));
      } else {
        columns_of(columns.sums[i / kLanes], sums);
      }
    }
    total += sums[i % kLanes];
    if (--left > 0) continue;
    store_four<C>(total, out);
    out += kSums;
    total = Four{};
    left = a_row;
  }
}
