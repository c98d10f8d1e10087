// float16 storage, computed in float32. Conversions are those of F16C and of Arm, which round to nearest, ties to even,
// and keep the upper bits of a NaN; without such instructions the same is computed on integers.
#pragma once

#include "isa.h"

SPARSEKERN_BEGIN_ISA

struct Float16 {
  uint16_t bits;
};

#if defined(__F16C__)
inline float widen(Float16 x) {
  return _cvtsh_ss(x.bits);
}
inline void narrow(float x, Float16* out) {
  out->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__aarch64__)
inline float widen(Float16 x) {
  return float(__builtin_bit_cast(__fp16, x.bits));
}
inline void narrow(float x, Float16* out) {
  out->bits = __builtin_bit_cast(uint16_t, __fp16(x));
}
#else
// For x86-64 before 2012 and for other machines. Not inlined, because that takes seconds of compile time.
__attribute__((noinline)) inline float widen(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = uint32_t(x.bits & 0x7fffu) << 13;
  constexpr uint32_t kRebias = 112u << 23, kInfinity = 0x7c00u << 13, kSmallest = 113u << 23, kQuiet = 1u << 22;
  uint32_t bits = rest + kRebias;
  if (rest >= kInfinity) {
    bits = rest + 2 * kRebias + (rest > kInfinity ? kQuiet & ~rest : 0);
  } else if (rest < 1u << 23) {
    // A subnormal number: the difference from the smallest normal one is exact.
    const float difference = __builtin_bit_cast(float, rest + kSmallest) - __builtin_bit_cast(float, kSmallest);
    bits = __builtin_bit_cast(uint32_t, difference);
  }
  return __builtin_bit_cast(float, sign | bits);
}
__attribute__((noinline)) inline void narrow(float x, Float16* out) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  constexpr uint32_t kInfinity = 0x7f800000u, kTooLarge = 143u << 23, kSmallest = 113u << 23, kRebias = 112u << 23;
  uint32_t half;
  if (rest > kInfinity) {
    half = 0x7e00u | (rest >> 13 & 0x3ffu);
  } else if (rest >= kTooLarge) {
    half = 0x7c00u;
  } else if (rest < kSmallest) {
    // The last bit of this sum has the value of the last bit of a subnormal number.
    const float sum = __builtin_bit_cast(float, rest) + 0.5f;
    half = __builtin_bit_cast(uint32_t, sum) - __builtin_bit_cast(uint32_t, 0.5f);
  } else {
    // A carry goes to the exponent, and from the largest one to infinity.
    half = (rest - kRebias + 0xfffu + (rest >> 13 & 1u)) >> 13;
  }
  out->bits = uint16_t(sign | half);
}
#endif

SPARSEKERN_END_ISA
