// Vectors of this ISA, and the four sums of a row in sixteen lanes, which are one or more of such vectors.
#pragma once

#include "bfloat16.h"

SPARSEKERN_BEGIN_ISA

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr int kLanes = 16;

// For functions that work on sums: sums stay in registers only if every function that uses them is inlined.
#define SPARSEKERN_ALWAYS __attribute__((always_inline))
#define SPARSEKERN_INLINE SPARSEKERN_ALWAYS inline

// The numbers from 0 to n - 1 as a list of arguments.
template <int... numbers>
struct Places {};
template <int n, int... numbers>
struct PlacesBelow : PlacesBelow<n - 1, n - 1, numbers...> {};
template <int... numbers>
struct PlacesBelow<0, numbers...> {
  using Type = Places<numbers...>;
};

template <class C>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using Type = int32_t;
};
template <>
struct IntegerOf<double> {
  using Type = int64_t;
};

// The even (first = 0) or the odd (first = 1) ones of sixteen elements, which begin at element i.
template <int first>
struct EveryOther {
  int64_t i;
};

template <class C>
struct Vectors {
  static constexpr int kWidth = kVectorBytes / sizeof(C);

  using Integer = typename IntegerOf<C>::Type;
  typedef C Vector __attribute__((vector_size(kVectorBytes)));
  typedef Integer Integers __attribute__((vector_size(kVectorBytes)));

  SPARSEKERN_INLINE static Vector load(const C* from) {
    Vector vector;
    __builtin_memcpy(&vector, from, sizeof(vector));
    return vector;
  }

#if defined(__AVX512F__)
  typedef uint16_t Words __attribute__((vector_size(64)));

  // Widens bfloat16 numbers a * 16 to a * 16 + 15 of a register to floats. This takes one instruction; conversion of
  // integers and a shift take two to five.
  template <int a>
  SPARSEKERN_INLINE static Vector widened(__m512i halves) {
    Words from;
    for (int w = 0; w < 32; ++w) from[w] = a * 16 + w / 2;
    return (Vector)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, (__m512i)from, halves);
  }

  // Rounds as `narrow` does, but not NaN; the result is in the upper halves.
  SPARSEKERN_INLINE static __m512i rounded_number(Vector vector) {
    const __m512i bits = (__m512i)vector;
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i down = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(down, odd, bits, _mm512_set1_epi32(0x8000));
  }

  // The same, including NaN.
  SPARSEKERN_INLINE static __m512i rounded(Vector vector) {
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)vector, (__m512)vector, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(rounded_number(vector), nan, _mm512_set1_epi32(0x7fc00000));
  }

  // The upper halves of the lanes of `a`, then those of `b`.
  SPARSEKERN_INLINE static __m512i upper_halves(__m512i a, __m512i b) {
    Words from;
    for (int w = 0; w < 32; ++w) from[w] = 2 * w + 1;
    return _mm512_permutex2var_epi16(a, (__m512i)from, b);
  }

  SPARSEKERN_INLINE static Vector load(const BFloat16* from) {
    return widened<0>(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)from)));
  }
#elif defined(__AVX2__)
  // GCC 12 compiles the lines for other machines to five instructions here, and those of store() to fifteen.
  SPARSEKERN_INLINE static Vector load(const BFloat16* from) {
    return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
  }
#else
  SPARSEKERN_INLINE static Vector load(const BFloat16* from) {
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
    Halves halves;
    __builtin_memcpy(&halves, from, sizeof(halves));
    return (Vector)(__builtin_convertvector(halves, Integers) << 16);
  }
#endif

  SPARSEKERN_INLINE static Vector load(const Float16* from) {
#if defined(__AVX512F__)
    // GCC 12 warns about an uninitialised vector in the functions without a mask.
    return (Vector)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)from));
#elif defined(__F16C__)
    return (Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#elif defined(__aarch64__)
    return (Vector)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from->bits)));
#else
    Vector vector;
    for (int l = 0; l < kWidth; ++l) vector[l] = widen(from[l]);
    return vector;
#endif
  }

  SPARSEKERN_INLINE static void store(Vector vector, C* to) { __builtin_memcpy(to, &vector, sizeof(vector)); }

  // Rounds as `narrow` does.
  SPARSEKERN_INLINE static void store(Vector vector, BFloat16* to) {
#if defined(__AVX512F__)
    const __m512i halves = upper_halves(rounded(vector), __m512i{});
    _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(halves));
#elif defined(__AVX2__)
    const __m256i bits = (__m256i)vector, odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i number = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256 nan = _mm256_cmp_ps((__m256)vector, (__m256)vector, _CMP_UNORD_Q);
    const __m256 rounded = _mm256_blendv_ps((__m256)number, (__m256)_mm256_set1_epi32(0x7fc00000), nan);
    const __m256i halves = _mm256_srli_epi32((__m256i)rounded, 16);
    const __m128i low = _mm256_castsi256_si128(halves), high = _mm256_extracti128_si256(halves, 1);
    _mm_storeu_si128((__m128i*)to, _mm_packus_epi32(low, high));
#else
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
    typedef uint32_t Unsigned __attribute__((vector_size(kVectorBytes)));
    const Unsigned bits = (Unsigned)vector;
    const Unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Unsigned nan = (Unsigned)((bits & 0x7fffffffu) > 0x7f800000u);
    const Halves halves = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), Halves);
    __builtin_memcpy(to, &halves, sizeof(halves));
#endif
  }

  SPARSEKERN_INLINE static void store(Vector vector, Float16* to) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)to, _mm512_maskz_cvtps_ph(0xffff, (__m512)vector, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)vector, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
    vst1_u16(&to->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)vector)));
#else
    for (int l = 0; l < kWidth; ++l) narrow(vector[l], to + l);
#endif
  }

  // Adding to zeros would cost an addition, because it changes -0 to 0; subtracting zeros costs nothing.
  SPARSEKERN_INLINE static Vector repeat(C value) { return value - Vector{}; }

  // Repeats each number four times.
  SPARSEKERN_INLINE static Vector fourfold(const C* from) {
#if defined(__AVX512F__)
    if constexpr (sizeof(C) == 4) {
      const __m512i within = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
      return (Vector)_mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(from)), within);
    }
#endif
    Vector vector;
    for (int l = 0; l < kWidth; ++l) vector[l] = from[l / 4];
    return vector;
  }

  // Elements `first`, first + 2, and so on of those of `a`, then of `b`.
  template <int first>
  SPARSEKERN_INLINE static Vector every_other(Vector a, Vector b) {
    return alternate<first>(a, b, typename PlacesBelow<kWidth>::Type());
  }

  // Replaces the elements from `count` on by 0, even NaN.
  SPARSEKERN_INLINE static Vector first(Vector vector, int64_t count) {
    Integers index;
    for (int l = 0; l < kWidth; ++l) index[l] = l;
    return (Vector)((Integers)vector & (index < Integer(count)));
  }

  // In every four lanes: elements i and j of `a`, then of `b`, counted from the first of the four lanes. Interleaved: i
  // of `a`, i of `b`, j of `a`, j of `b`.
  template <int i, int j, bool kInterleaved>
  SPARSEKERN_INLINE static Vector pick(Vector a, Vector b) {
    return picked<i, j, kInterleaved>(a, b, typename PlacesBelow<kWidth>::Type());
  }

  // For vectors of four and more lanes: adds up every four neighbouring lanes of each of four vectors and returns the
  // four sums side by side in those lanes.
  SPARSEKERN_INLINE static Vector quads(Vector a, Vector b, Vector c, Vector d) {
    const Vector ab = pick<0, 1, true>(a, b) + pick<2, 3, true>(a, b);
    const Vector cd = pick<0, 1, true>(c, d) + pick<2, 3, true>(c, d);
    return pick<0, 1, false>(ab, cd) + pick<2, 3, false>(ab, cd);
  }

  SPARSEKERN_INLINE static Vector magnitude(Vector vector) {
    constexpr Integer kMagnitude = ~(Integer(1) << (sizeof(C) * 8 - 1));
    return (Vector)((Integers)vector & kMagnitude);
  }

  // 1 in lanes whose absolute value exceeds the threshold, else 0.
  SPARSEKERN_INLINE static Vector exceeds(Vector vector, Vector threshold) {
    const Vector one = Vector{} + C(1);
    return (Vector)((Integers)one & (magnitude(vector) > threshold));
  }

  // Adds exceeds(vector, threshold) to `count`.
  SPARSEKERN_INLINE static void count_exceeding(Vector& count, Vector vector, Vector threshold) {
#if defined(__AVX512F__)
    if constexpr (sizeof(C) == 4) {
      const __m512 old = (__m512)count, one = _mm512_set1_ps(1);
      const __mmask16 which = _mm512_cmp_ps_mask((__m512)magnitude(vector), (__m512)threshold, _CMP_GT_OQ);
      count = (Vector)_mm512_mask_add_ps(old, which, old, one);
      return;
    }
#endif
    count += exceeds(vector, threshold);
  }

 private:
  // Where pick() takes lane `l` from: lanes of `b` are counted behind those of `a`.
  static constexpr int source(int i, int j, bool interleaved, int l) {
    const int place = l % 4;
    const bool second = interleaved ? place >= 2 : place % 2 == 1;
    const bool of_b = interleaved ? place % 2 == 1 : place >= 2;
    return l - place + (second ? j : i) + (of_b ? kWidth : 0);
  }

  template <int i, int j, bool kInterleaved, int... l>
  SPARSEKERN_INLINE static Vector picked(Vector a, Vector b, Places<l...>) {
    return shuffled<source(i, j, kInterleaved, l)...>(a, b);
  }

  template <int first, int... l>
  SPARSEKERN_INLINE static Vector alternate(Vector a, Vector b, Places<l...>) {
    return shuffled<(first + 2 * l)...>(a, b);
  }

  // Lanes of `b` are counted behind those of `a`.
  template <int... from>
  SPARSEKERN_INLINE static Vector shuffled(Vector a, Vector b) {
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(a, b, from...);
#else
    return __builtin_shuffle(a, b, Integers{from...});
#endif
  }
};

template <class C, int kVectors>
struct LanesOf;

template <class C>
struct LanesOf<C, 0> {
  template <class... Arguments>
  void add(Arguments...) {}
  template <class... Arguments>
  void add_first(Arguments...) {}
  void add_quads_to(C*) const {}
  void store(C*, C*, C*, C*) const {}
};

// Recursion over vectors: the compiler would keep an array of vectors in memory and not in registers.
template <class C, int kVectors>
struct LanesOf : LanesOf<C, kVectors - 1> {
  using V = Vectors<C>;
  using Rest = LanesOf<C, kVectors - 1>;

  typename V::Vector count = {}, dot = {}, grad_sq = {}, weight_sq = {};

  // Adds sixteen elements; `threshold` is one of values.h, read from index `i` on.
  template <class S, class D, class Threshold>
  SPARSEKERN_INLINE void add(const S* w, const D* d, Threshold threshold, int64_t i) {
    add_vector(V::load(w), V::load(d), threshold.vector(i));
    Rest::add(w + V::kWidth, d + V::kWidth, threshold, i + V::kWidth);
  }

  // Adds the first `n` of sixteen elements.
  template <class S, class D, class Threshold>
  SPARSEKERN_INLINE void add_first(const S* w, const D* d, int64_t n, Threshold threshold, int64_t i) {
    add_vector(V::first(V::load(w), n), V::first(V::load(d), n), threshold.vector(i));
    Rest::add_first(w + V::kWidth, d + V::kWidth, n - V::kWidth, threshold, i + V::kWidth);
  }

  // Adds the sums over every four lanes: count, dot, grad_sq and weight_sq of the first four, then of the next.
  SPARSEKERN_INLINE void add_quads_to(C* sums) const {
    if constexpr (V::kWidth >= 4) {
      const typename V::Vector total = V::load(sums) + V::quads(count, dot, grad_sq, weight_sq);
      __builtin_memcpy(sums, &total, kVectorBytes);
      Rest::add_quads_to(sums + V::kWidth);
    } else {
      C lane[4][kVectors * V::kWidth];
      store(lane[0], lane[1], lane[2], lane[3]);
      for (int q = 0; q < kVectors * V::kWidth; q += 4)
        for (int s = 0; s < 4; ++s) sums[q + s] += (lane[s][q] + lane[s][q + 2]) + (lane[s][q + 1] + lane[s][q + 3]);
    }
  }

  // Adds the elements of one vector.
  SPARSEKERN_INLINE void add_vector(typename V::Vector w, typename V::Vector d, typename V::Vector threshold) {
    V::count_exceeding(count, d, threshold);
    dot += w * d;
    grad_sq += d * d;
    weight_sq += w * w;
  }

  SPARSEKERN_INLINE void store(C* counts, C* dots, C* grad_sqs, C* weight_sqs) const {
    __builtin_memcpy(counts, &count, kVectorBytes);
    __builtin_memcpy(dots, &dot, kVectorBytes);
    __builtin_memcpy(grad_sqs, &grad_sq, kVectorBytes);
    __builtin_memcpy(weight_sqs, &weight_sq, kVectorBytes);
    constexpr int w = V::kWidth;
    Rest::store(counts + w, dots + w, grad_sqs + w, weight_sqs + w);
  }
};

// Vectors that sixteen lanes take.
template <class C>
constexpr int kLaneVectors = kLanes * sizeof(C) / kVectorBytes;

template <class C>
using Lanes = LanesOf<C, kLaneVectors<C>>;

SPARSEKERN_END_ISA
