// bfloat16 by its bits: rounded to nearest, ties to even.
#pragma once

#include "cuda_runtime.h"

inline uint16_t __bfloat16_as_ushort(uint16_t bits) { return bits; }
inline uint16_t __float2bfloat16_rn(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
