// Folds the lanes of the four sums of a row (count, dot, grad_sq, weight_sq) and stores the sums.
#pragma once

#include "lanes.h"

SPARSEKERN_BEGIN_ISA

constexpr int kSums = 4;

// count, dot, grad_sq, weight_sq side by side.
template <class C>
struct FourOf {
  typedef C Type __attribute__((vector_size(kSums * sizeof(C))));
};

template <class C>
inline void store_four(const typename FourOf<C>::Type& four, float* out) {
  for (int s = 0; s < kSums; ++s) out[s] = float(four[s]);
}

// Transposes four lanes of each sum to the four sums of each lane.
template <class C>
inline void transpose(const typename FourOf<C>::Type (&sums)[kSums], typename FourOf<C>::Type (&lanes)[4]) {
  for (int l = 0; l < 4; ++l) lanes[l] = typename FourOf<C>::Type{sums[0][l], sums[1][l], sums[2][l], sums[3][l]};
}

#if defined(__AVX512F__)
// Quarters i and j of `a`, then of `b`. GCC 12 warns about an uninitialised vector in the functions without a mask.
template <int i, int j>
SPARSEKERN_INLINE __m512 quarters(__m512 a, __m512 b) {
  return _mm512_maskz_shuffle_f32x4(0xffff, a, b, i | j << 2 | i << 4 | j << 6);
}

// The function below for AVX-512, with the same order of additions: 16 to 4 lanes, of two sums at a time.
SPARSEKERN_INLINE void store_row(const Lanes<float>& sums, float* out) {
  const __m512 count = (__m512)sums.count, dot = (__m512)sums.dot;
  const __m512 grad_sq = (__m512)sums.grad_sq, weight_sq = (__m512)sums.weight_sq;
  const __m512 a = _mm512_add_ps(quarters<0, 1>(count, dot), quarters<2, 3>(count, dot));
  const __m512 b = _mm512_add_ps(quarters<0, 1>(grad_sq, weight_sq), quarters<2, 3>(grad_sq, weight_sq));
  __m512 folded = _mm512_add_ps(quarters<0, 2>(a, b), quarters<1, 3>(a, b));
  folded = _mm512_add_ps(folded, _mm512_maskz_permute_ps(0xffff, folded, 0x4e));
  folded = _mm512_add_ps(folded, _mm512_maskz_permute_ps(0xffff, folded, 0xb1));
  const __m512i firsts = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
  _mm_storeu_ps(out, _mm512_maskz_extractf32x4_ps(0xf, _mm512_maskz_permutexvar_ps(0xffff, firsts, folded), 0));
}
#endif

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

// Maximum number of columns of a tile.
constexpr int64_t kTile = 2048;

// Sums of the columns of a tile, folded into rows at its end: one lane per column, or, if the width of a row is a
// multiple of four (quads), the four sums of every four neighbouring columns, which take a quarter of the memory.
template <class C>
struct Columns {
  bool quads;
  union {
    Lanes<C> sums[kTile / kLanes];
    C quad_sums[kTile];
  };

  void clear(int64_t n, int64_t width) {
    quads = width % 4 == 0;
    __builtin_memset(quad_sums, 0, (n + kLanes - 1) / kLanes * (quads ? kLanes * sizeof(C) : sizeof(Lanes<C>)));
  }
};

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

// Stores the sums of the first n of sixteen columns; all of them if n is larger.
template <class C>
inline void store_singles(const Lanes<C>& lanes, int64_t n, float* out) {
  typename FourOf<C>::Type sums[kLanes];
  columns_of(lanes, sums);
  for (int64_t i = 0; i < (n < kLanes ? n : kLanes); ++i) store_four<C>(sums[i], out + i * kSums);
}

#if defined(__AVX512F__)
SPARSEKERN_INLINE void store_singles(const Lanes<float>& lanes, int64_t n, float* out) {
  const __m512 count = (__m512)lanes.count, dot = (__m512)lanes.dot;
  const __m512 grad_sq = (__m512)lanes.grad_sq, weight_sq = (__m512)lanes.weight_sq;
  const __m512d low = (__m512d)_mm512_unpacklo_ps(count, dot), high = (__m512d)_mm512_unpackhi_ps(count, dot);
  const __m512d low_sq = (__m512d)_mm512_unpacklo_ps(grad_sq, weight_sq);
  const __m512d high_sq = (__m512d)_mm512_unpackhi_ps(grad_sq, weight_sq);
  // `a` has the sums of columns 0, 4, 8 and 12, `b` those of columns 1, 5, 9 and 13, and so on.
  const __m512 a = (__m512)_mm512_unpacklo_pd(low, low_sq), b = (__m512)_mm512_unpackhi_pd(low, low_sq);
  const __m512 c = (__m512)_mm512_unpacklo_pd(high, high_sq), d = (__m512)_mm512_unpackhi_pd(high, high_sq);
  const __m512 ab_first = quarters<0, 1>(a, b), cd_first = quarters<0, 1>(c, d);
  const __m512 ab_second = quarters<2, 3>(a, b), cd_second = quarters<2, 3>(c, d);
  const __m512 columns[] = {quarters<0, 2>(ab_first, cd_first), quarters<1, 3>(ab_first, cd_first),
                            quarters<0, 2>(ab_second, cd_second), quarters<1, 3>(ab_second, cd_second)};
#pragma GCC unroll 4
  for (int part = 0; part < 4; ++part) {
    const int64_t left = n - part * 4;
    if (left >= 4) {
      _mm512_storeu_ps(out + part * kLanes, columns[part]);
    } else if (left > 0) {
      _mm512_mask_storeu_ps(out + part * kLanes, __mmask16((1u << left * kSums) - 1), columns[part]);
    }
  }
}
#endif

// Adds up the `width` columns of each of `rows` rows, in order, and stores the sums of each row.
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

SPARSEKERN_END_ISA
