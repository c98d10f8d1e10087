// The four sums of a row: count, dot, grad_sq, weight_sq.

constexpr int kSums = 4;

// Elements looked at before they are updated: four arrays of this many floats stay in a first-level cache
// between the two passes. 4096 leaves it and costs a quarter of the speed.
constexpr int64_t kBlock = 512;

template <class C>
inline C absolute(C x) {
  return x < 0 ? -x : x;
}

// Adds n elements of one row; its blocks start at multiples of 16. Up to `readable` elements may be looked at.
template <class S, class C>
SPARSEKERN_INLINE void add_row(Lanes<C>& sums, const S* w, const C* d, int64_t n, int64_t readable, C threshold) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sums.add(w + i, d + i, threshold);
  if (i == n) return;
  S last_w[kLanes];
  C last_d[kLanes];
  if (i + kLanes > readable) {
    for (int64_t l = 0; l < n - i; ++l) last_w[l] = w[i + l];
    for (int64_t l = 0; l < n - i; ++l) last_d[l] = d[i + l];
    w = last_w - i;
    d = last_d - i;
  }
  sums.add_first(w + i, d + i, n - i, threshold);
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

// Folds the lanes (16 to 4, transpose, 4 to 1) and stores the four sums side by side.
template <class C>
inline void store_row(const Lanes<C>& sums, float* out) {
  typedef C Four __attribute__((vector_size(4 * sizeof(C))));
  C lanes[kSums][kLanes];
  sums.store(lanes[0], lanes[1], lanes[2], lanes[3]);
  Four four[kSums];
  for (int s = 0; s < kSums; ++s) {
    Four part[kLanes / 4];
    __builtin_memcpy(part, lanes[s], sizeof(part));
    four[s] = (part[0] + part[2]) + (part[1] + part[3]);
  }
  Four lane[4];
  for (int l = 0; l < 4; ++l) lane[l] = Four{four[0][l], four[1][l], four[2][l], four[3][l]};
  const Four total = (lane[0] + lane[2]) + (lane[1] + lane[3]);
  for (int s = 0; s < kSums; ++s) out[s] = float(total[s]);
}

// Sums of short or interleaved rows: one accumulator per element of a block of columns, folded at the end.
template <class C>
struct Columns {
  C sum[kSums][kBlock];
};

template <bool kAdd, class S, class C>
inline void add_columns(Columns<C>& sums, const S* __restrict w, const C* __restrict d, int64_t n,
                        const C* __restrict threshold) {
  C* __restrict count = sums.sum[0];
  C* __restrict dot = sums.sum[1];
  C* __restrict grad_sq = sums.sum[2];
  C* __restrict weight_sq = sums.sum[3];
  for (int64_t i = 0; i < n; ++i) {
    const C x = widen(w[i]), y = d[i];
    const C exceeds = absolute(y) > threshold[i] ? C(1) : C(0);
    count[i] = kAdd ? count[i] + exceeds : exceeds;
    dot[i] = kAdd ? dot[i] + x * y : x * y;
    grad_sq[i] = kAdd ? grad_sq[i] + y * y : y * y;
    weight_sq[i] = kAdd ? weight_sq[i] + x * x : x * x;
  }
}

// Folds `width` neighbouring columns into each of `rows` rows, in their order.
template <class C>
inline void store_columns(const Columns<C>& sums, int64_t rows, int64_t width, float* __restrict out) {
  if (width == 1) {
    for (int64_t r = 0; r < rows; ++r)
      for (int s = 0; s < kSums; ++s) out[r * kSums + s] = float(sums.sum[s][r]);
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    C total[kSums] = {0, 0, 0, 0};
    for (int64_t i = r * width; i < (r + 1) * width; ++i)
      for (int s = 0; s < kSums; ++s) total[s] += sums.sum[s][i];
    for (int s = 0; s < kSums; ++s) out[r * kSums + s] = float(total[s]);
  }
}
