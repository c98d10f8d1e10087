// A 64-byte register of a tensor's elements in their storage type, and the vectors of the compute type in it (AVX-512).
// The loops of fused_update.h work on such registers.
#pragma once

#include "lanes.h"

SPARSEKERN_BEGIN_ISA

// Whether the loops of fused_update.h take the storage type.
template <class S>
constexpr bool kHasRegisters = kVectorBytes == 64 && (__is_same(S, float) || __is_same(S, BFloat16));

#if defined(__AVX512F__)
template <class S>
struct Registers;

template <>
struct Registers<float> {
  using Vector = Vectors<float>::Vector;
  using Whole = Vector;
  static constexpr int kElements = 16, kVectors = 1;

  SPARSEKERN_INLINE static Whole load(const float* from) { return Vectors<float>::load(from); }
  SPARSEKERN_INLINE static void store(Whole whole, float* to) { Vectors<float>::store(whole, to); }

  // Loads the first n elements; the others are 0, and their memory is not read.
  SPARSEKERN_INLINE static Whole load_first(const float* from, int64_t n) {
    return (Whole)_mm512_maskz_loadu_ps(first(n), from);
  }
  SPARSEKERN_INLINE static void store_first(Whole whole, float* to, int64_t n) {
    _mm512_mask_storeu_ps(to, first(n), (__m512)whole);
  }

  template <int part>
  SPARSEKERN_INLINE static Vector vector(Whole whole) {
    return whole;
  }

  // Updated vectors, rounded to the storage type but not joined yet.
  using Rounded = Vector;
  SPARSEKERN_INLINE static Rounded round(Vector vector) { return vector; }
  SPARSEKERN_INLINE static Rounded round_number(Vector vector) { return vector; }
  SPARSEKERN_INLINE static bool any_nan(Vector, Vector) { return false; }
  SPARSEKERN_INLINE static Whole join(const Rounded (&parts)[1]) { return parts[0]; }

 private:
  SPARSEKERN_INLINE static __mmask16 first(int64_t n) { return __mmask16((1u << n) - 1); }
};

template <>
struct Registers<BFloat16> {
  using V = Vectors<float>;
  using Vector = V::Vector;
  using Whole = __m512i;
  static constexpr int kElements = 32, kVectors = 2;

  SPARSEKERN_INLINE static Whole load(const BFloat16* from) { return _mm512_loadu_si512(from); }
  SPARSEKERN_INLINE static void store(Whole whole, BFloat16* to) { _mm512_storeu_si512(to, whole); }
  SPARSEKERN_INLINE static Whole load_first(const BFloat16* from, int64_t n) {
    return _mm512_maskz_loadu_epi16(first(n), from);
  }
  // Stores half a register if that is enough: a later load waits for a masked store that may overlap with it.
  SPARSEKERN_INLINE static void store_first(Whole whole, BFloat16* to, int64_t n) {
    if (n <= kElements / 2) {
      _mm256_mask_storeu_epi16(to, __mmask16(first(n)), _mm512_castsi512_si256(whole));
    } else {
      _mm512_mask_storeu_epi16(to, first(n), whole);
    }
  }

  template <int part>
  SPARSEKERN_INLINE static Vector vector(Whole whole) {
    return V::widened<part>(whole);
  }

  using Rounded = __m512i;
  SPARSEKERN_INLINE static Rounded round(Vector vector) { return V::rounded(vector); }
  SPARSEKERN_INLINE static Rounded round_number(Vector vector) { return V::rounded_number(vector); }
  SPARSEKERN_INLINE static bool any_nan(Vector a, Vector b) {
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q) != 0;
  }
  SPARSEKERN_INLINE static Whole join(const Rounded (&parts)[2]) { return V::upper_halves(parts[0], parts[1]); }

 private:
  SPARSEKERN_INLINE static __mmask32 first(int64_t n) { return __mmask32((uint64_t(1) << n) - 1); }
};
#endif

SPARSEKERN_END_ISA
