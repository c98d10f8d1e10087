// Storage types and their compute types. float16 has a file of its own; bfloat16 is stored as bits and rounded as in
// torch: to nearest, ties to even, and every NaN to 0x7fc0.
#pragma once

#include "float16.h"

SPARSEKERN_BEGIN_ISA

struct BFloat16 {
  uint16_t bits;
};

template <class S>
struct Compute {
  using Type = S;
};
template <>
struct Compute<BFloat16> {
  using Type = float;
};
template <>
struct Compute<Float16> {
  using Type = float;
};

inline float widen(float x) {
  return x;
}
inline double widen(double x) {
  return x;
}
inline float widen(BFloat16 x) {
  return __builtin_bit_cast(float, uint32_t(x.bits) << 16);
}

inline void narrow(float x, float* out) {
  *out = x;
}
inline void narrow(double x, double* out) {
  *out = x;
}
inline void narrow(float x, BFloat16* out) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = uint16_t(nan ? 0x7fc0u : rounded);
}

SPARSEKERN_END_ISA
