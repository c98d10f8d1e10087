// Square roots and selections, for a vector of elements.
#pragma once

#include "lanes.h"

SPARSEKERN_BEGIN_ISA

using Floats = Vectors<float>::Vector;
using Doubles = Vectors<double>::Vector;

SPARSEKERN_INLINE Floats square_root(Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Floats)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (Floats)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
  return (Floats)vsqrtq_f32((float32x4_t)x);
#else
  for (int l = 0; l < Vectors<float>::kWidth; ++l) x[l] = __builtin_sqrtf(x[l]);
  return x;
#endif
}

SPARSEKERN_INLINE Doubles square_root(Doubles x) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  return (Doubles)_mm256_sqrt_pd((__m256d)x);
#elif defined(__x86_64__)
  return (Doubles)_mm_sqrt_pd((__m128d)x);
#elif defined(__aarch64__)
  return (Doubles)vsqrtq_f64((float64x2_t)x);
#else
  for (int l = 0; l < Vectors<double>::kWidth; ++l) x[l] = __builtin_sqrt(x[l]);
  return x;
#endif
}

// Returns `a` if all bits of `which` are set and `b` if none is.
SPARSEKERN_INLINE Floats select(int32_t which, Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_mask_blend_ps(__mmask16(which), (__m512)b, (__m512)a);
#elif defined(__AVX2__)
  return (Floats)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)_mm256_set1_epi32(which));
#else
  using Integers = Vectors<float>::Integers;
  return (Floats)(((Integers)a & which) | ((Integers)b & ~which));
#endif
}

SPARSEKERN_INLINE Doubles select(int64_t which, Doubles a, Doubles b) {
  using Integers = Vectors<double>::Integers;
  return (Doubles)(((Integers)a & which) | ((Integers)b & ~which));
}

SPARSEKERN_END_ISA
