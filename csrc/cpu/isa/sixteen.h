// Sixteen elements of an array as vectors of the compute type, in the order that takes the fewest instructions. With
// AVX2, two vectors of bfloat16 hold the even and the odd elements: a shift makes one of them and a mask the other, and
// two instructions join them again. Vectors of neighbouring elements take twice as many.
#pragma once

#include "values.h"

SPARSEKERN_BEGIN_ISA

// Whether the vectors of sixteen elements are those of EveryOther.
template <class S>
constexpr bool kEveryOther = kVectorBytes == 32 && __is_same(S, BFloat16);

template <class S>
struct Sixteen {
  using V = Vectors<typename Compute<S>::Type>;

  template <int part>
  SPARSEKERN_INLINE static int64_t place(int64_t i) {
    return i + part * V::kWidth;
  }
  // Loads vector `part`; T is S or the compute type.
  template <int part, class T>
  SPARSEKERN_INLINE static typename V::Vector load(const T* from) {
    return V::load(from + part * V::kWidth);
  }
};

#if defined(__AVX2__) && !defined(__AVX512F__)
template <>
struct Sixteen<BFloat16> {
  using V = Vectors<float>;
  using Vector = V::Vector;

  template <int part>
  SPARSEKERN_INLINE static EveryOther<part> place(int64_t i) {
    return {i};
  }
  template <int part>
  SPARSEKERN_INLINE static Vector load(const BFloat16* from) {
    return widened<part>(_mm256_loadu_si256((const __m256i*)from));
  }
  template <int part>
  SPARSEKERN_INLINE static Vector load(const float* from) {
    return V::every_other<part>(V::load(from), V::load(from + V::kWidth));
  }
  template <int part>
  SPARSEKERN_INLINE static Vector widened(__m256i both) {
    return (Vector)(part == 0 ? _mm256_slli_epi32(both, 16) : _mm256_and_si256(both, _mm256_set1_epi32(0xffff0000)));
  }

  // Rounds as `narrow` does, except that a NaN has to be that of one_nan().
  SPARSEKERN_INLINE static void store(Vector even, Vector odd, BFloat16* to) {
    const __m256i low = _mm256_srli_epi32(rounded(even), 16);
    _mm256_storeu_si256((__m256i*)to, _mm256_blend_epi16(low, rounded(odd), 0xaa));
  }
  SPARSEKERN_INLINE static bool any_nan(Vector a, Vector b) {
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q)) != 0;
  }
  SPARSEKERN_INLINE static Vector one_nan(Vector vector) {
    const __m256 nan = _mm256_cmp_ps((__m256)vector, (__m256)vector, _CMP_UNORD_Q);
    return (Vector)_mm256_blendv_ps((__m256)vector, (__m256)_mm256_set1_epi32(0x7fc00000), nan);
  }

 private:
  // The result is in the upper halves: adds 0x7fff to even and 0x8000 to odd numbers. The selection takes one
  // instruction less than the addition of the lowest bit (5 % of a step on AMD EPYC, Zen 4).
  SPARSEKERN_INLINE static __m256i rounded(Vector vector) {
    const __m256i bits = (__m256i)vector;
    const __m256 down = (__m256)_mm256_set1_epi32(0x7fff), up = (__m256)_mm256_set1_epi32(0x8000);
    return _mm256_add_epi32(bits, (__m256i)_mm256_blendv_ps(down, up, (__m256)_mm256_slli_epi32(bits, 15)));
  }
};
#endif

SPARSEKERN_END_ISA
