// The lanes that take the four sums of a contiguous row: those of lanes.h; with AVX2, lanes that need fewer registers,
// for bfloat16 in the order of sixteen.h.
#pragma once

#include "row_sums.h"
#include "sixteen.h"

SPARSEKERN_BEGIN_ISA

template <class S>
struct RowLanesOf {
  using Type = Lanes<typename Compute<S>::Type>;
};

#if defined(__AVX2__) && !defined(__AVX512F__)
// Vector 0 of a sum has the even lanes and vector 1 the odd ones. The counts are numbers of 16 bits, in the order of
// the elements: enough for the longest row of a chunk (32768 elements, 2048 for each lane).
struct EveryOtherLanes {
  using Order = Sixteen<BFloat16>;
  using V = Vectors<float>;
  using Vector = V::Vector;

  __m256i count = {};
  Vector dot[2] = {}, grad_sq[2] = {}, weight_sq[2] = {};

  // Adds sixteen elements.
  SPARSEKERN_INLINE void add(const BFloat16* w, const BFloat16* d, Same<float> threshold, int64_t) {
    add_stored(whole(w), whole(d), threshold);
  }
  SPARSEKERN_INLINE void add(const BFloat16* w, const float* d, Same<float> threshold, int64_t) {
    add_converted(whole(w), Order::load<0>(d), Order::load<1>(d), threshold);
  }

  // Adds the first n < 16 of sixteen elements.
  SPARSEKERN_INLINE void add_first(const BFloat16* w, const BFloat16* d, int64_t n, Same<float> threshold, int64_t) {
    add_stored(first(whole(w), n), first(whole(d), n), threshold);
  }
  SPARSEKERN_INLINE void add_first(const BFloat16* w, const float* d, int64_t n, Same<float> threshold, int64_t) {
    const Vector a = V::first(V::load(d), n), b = V::first(V::load(d + V::kWidth), n - V::kWidth);
    add_converted(first(whole(w), n), V::every_other<0>(a, b), V::every_other<1>(a, b), threshold);
  }

 private:
  SPARSEKERN_INLINE static __m256i whole(const BFloat16* from) { return _mm256_loadu_si256((const __m256i*)from); }

  SPARSEKERN_INLINE static __m256i first(__m256i elements, int64_t n) {
    const __m256i index = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm256_and_si256(elements, _mm256_cmpgt_epi16(_mm256_set1_epi16(int16_t(n)), index));
  }

  // A magnitude exceeds the threshold and is no NaN if its bits are from `lowest` to 0x7f80. A comparison of
  // differences finds those. It is signed, hence the 0x8000.
  SPARSEKERN_INLINE void add_stored(__m256i ws, __m256i ds, Same<float> threshold) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, threshold.value) & 0x7fffffff;
    const uint32_t lowest = threshold.value < 0 ? 0 : (bits >> 16) + 1;
    const __m256i shift = _mm256_set1_epi16(int16_t(0x8000 - lowest));
    const __m256i end = _mm256_set1_epi16(int16_t(lowest <= 0x7f80 ? 0x7f81 - lowest - 0x8000 : 0x8000));
    const __m256i magnitudes = _mm256_and_si256(ds, _mm256_set1_epi16(0x7fff));
    count = _mm256_sub_epi16(count, _mm256_cmpgt_epi16(end, _mm256_add_epi16(magnitudes, shift)));
    add_sums(ws, Order::widened<0>(ds), Order::widened<1>(ds));
  }

  SPARSEKERN_INLINE void add_converted(__m256i ws, Vector even_d, Vector odd_d, Same<float> threshold) {
    const __m256i even = (__m256i)(V::magnitude(even_d) > threshold.vector(0));
    const __m256i odd = (__m256i)(V::magnitude(odd_d) > threshold.vector(0));
    count = _mm256_sub_epi16(count, _mm256_blend_epi16(even, odd, 0xaa));
    add_sums(ws, even_d, odd_d);
  }

  SPARSEKERN_INLINE void add_sums(__m256i ws, Vector even_d, Vector odd_d) {
    const Vector even = Order::widened<0>(ws), odd = Order::widened<1>(ws);
    dot[0] += even * even_d;
    dot[1] += odd * odd_d;
    grad_sq[0] += even_d * even_d;
    grad_sq[1] += odd_d * odd_d;
    weight_sq[0] += even * even;
    weight_sq[1] += odd * odd;
  }
};

template <>
struct RowLanesOf<BFloat16> {
  using Type = EveryOtherLanes;
};

// Adds the halves of the even lanes, and those of the odd lanes: the results are the halves of one vector.
SPARSEKERN_INLINE Vectors<float>::Vector halves_added(Vectors<float>::Vector even, Vectors<float>::Vector odd) {
  const __m256 low = _mm256_permute2f128_ps((__m256)even, (__m256)odd, 0x20);
  const __m256 high = _mm256_permute2f128_ps((__m256)even, (__m256)odd, 0x31);
  return (Vectors<float>::Vector)_mm256_add_ps(low, high);
}

// The same order of additions as in row_sums.h.
SPARSEKERN_INLINE void store_row(const EveryOtherLanes& sums, float* out) {
  using V = Vectors<float>;
  const __m256i even = _mm256_and_si256(sums.count, _mm256_set1_epi32(0xffff));
  const __m256i odd = _mm256_srli_epi32(sums.count, 16);
  const V::Vector count = halves_added((V::Vector)_mm256_cvtepi32_ps(even), (V::Vector)_mm256_cvtepi32_ps(odd));
  const V::Vector dot = halves_added(sums.dot[0], sums.dot[1]);
  const V::Vector grad_sq = halves_added(sums.grad_sq[0], sums.grad_sq[1]);
  const V::Vector weight_sq = halves_added(sums.weight_sq[0], sums.weight_sq[1]);
  const __m256 quads = (__m256)V::quads(count, dot, grad_sq, weight_sq);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1)));
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// One vector counts for both vectors of sixteen lanes: whole numbers add up exactly in any order.
struct TwoVectorLanes {
  using V = Vectors<float>;
  using Vector = V::Vector;

  V::Integers count = {};
  Vector dot[2] = {}, grad_sq[2] = {}, weight_sq[2] = {};

  template <class S, class D>
  SPARSEKERN_INLINE void add(const S* w, const D* d, Same<float> threshold, int64_t) {
    add_vector(0, V::load(w), V::load(d), threshold.vector(0));
    add_vector(1, V::load(w + V::kWidth), V::load(d + V::kWidth), threshold.vector(0));
  }
  template <class S, class D>
  SPARSEKERN_INLINE void add_first(const S* w, const D* d, int64_t n, Same<float> threshold, int64_t) {
    add_vector(0, V::first(V::load(w), n), V::first(V::load(d), n), threshold.vector(0));
    const int64_t left = n - V::kWidth;
    add_vector(1, V::first(V::load(w + V::kWidth), left), V::first(V::load(d + V::kWidth), left), threshold.vector(0));
  }
  // Adds the first vector of sixteen elements, if the others are not there.
  SPARSEKERN_INLINE void add_first_vector(const float* w, const float* d, Same<float> threshold) {
    add_vector(0, V::load(w), V::load(d), threshold.vector(0));
  }

 private:
  SPARSEKERN_INLINE void add_vector(int part, Vector w, Vector d, Vector threshold) {
    count -= V::magnitude(d) > threshold;
    dot[part] += w * d;
    grad_sq[part] += d * d;
    weight_sq[part] += w * w;
  }
};

template <>
struct RowLanesOf<float> {
  using Type = TwoVectorLanes;
};
template <>
struct RowLanesOf<Float16> {
  using Type = TwoVectorLanes;
};

// The same order of additions as in row_sums.h.
SPARSEKERN_INLINE void store_row(const TwoVectorLanes& sums, float* out) {
  using V = Vectors<float>;
  const V::Vector count = (V::Vector)_mm256_cvtepi32_ps((__m256i)sums.count);
  const __m256 a = (__m256)halves_added(count, sums.dot[0] + sums.dot[1]);
  const __m256 b = (__m256)halves_added(sums.grad_sq[0] + sums.grad_sq[1], sums.weight_sq[0] + sums.weight_sq[1]);
  const __m256 pairs = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  const __m256 total = _mm256_add_ps(pairs, _mm256_permute_ps(pairs, 0xb1));
  _mm_storeu_ps(out, _mm_blend_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps(total, 1), 0xa));
}
#endif

template <class S>
using RowLanes = typename RowLanesOf<S>::Type;

SPARSEKERN_END_ISA
