// The four sums of a row: count, dot, grad_sq, weight_sq.

constexpr int kLanes = 16;
constexpr int kSums = 4;

// Elements looked at before they are updated: four arrays of this many floats stay in a first-level cache
// between the two passes. 4096 leaves it and costs a quarter of the speed.
constexpr int64_t kBlock = 512;

template <class C>
struct Lanes {
  C lane[kSums][kLanes];
};

template <class C>
inline C absolute(C x) {
  return x < 0 ? -x : x;
}

// Adds n elements of one row. The lane of an element is its index modulo 16: blocks start at multiples of 16.
template <class S, class C>
inline void add_row(Lanes<C>& sums, const S* __restrict w, const C* __restrict d, int64_t n, C threshold) {
  C count[kLanes], dot[kLanes], grad_sq[kLanes], weight_sq[kLanes];
  for (int l = 0; l < kLanes; ++l) count[l] = sums.lane[0][l];
  for (int l = 0; l < kLanes; ++l) dot[l] = sums.lane[1][l];
  for (int l = 0; l < kLanes; ++l) grad_sq[l] = sums.lane[2][l];
  for (int l = 0; l < kLanes; ++l) weight_sq[l] = sums.lane[3][l];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const C x = widen(w[i + l]), y = d[i + l];
      count[l] += absolute(y) > threshold ? C(1) : C(0);
      dot[l] += x * y;
      grad_sq[l] += y * y;
      weight_sq[l] += x * x;
    }
  }
  for (int l = 0; l < n - i; ++l) {
    const C x = widen(w[i + l]), y = d[i + l];
    count[l] += absolute(y) > threshold ? C(1) : C(0);
    dot[l] += x * y;
    grad_sq[l] += y * y;
    weight_sq[l] += x * x;
  }
  for (int l = 0; l < kLanes; ++l) sums.lane[0][l] = count[l];
  for (int l = 0; l < kLanes; ++l) sums.lane[1][l] = dot[l];
  for (int l = 0; l < kLanes; ++l) sums.lane[2][l] = grad_sq[l];
  for (int l = 0; l < kLanes; ++l) sums.lane[3][l] = weight_sq[l];
}

// Folds the lanes (16 to 4, transpose, 4 to 1) and stores the four sums side by side.
template <class C>
inline void store_row(const Lanes<C>& sums, float* out) {
  C four[kSums][4];
  for (int s = 0; s < kSums; ++s) {
    const C* lane = sums.lane[s];
    for (int l = 0; l < 4; ++l) four[s][l] = (lane[l] + lane[l + 8]) + (lane[l + 4] + lane[l + 12]);
  }
  for (int s = 0; s < kSums; ++s) out[s] = float((four[s][0] + four[s][2]) + (four[s][1] + four[s][3]));
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
