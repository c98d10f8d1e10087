// float16 by the compiler's own type.
#pragma once

#include "cuda_runtime.h"

inline _Float16 __ushort_as_half(uint16_t bits) { return emulated_cast<_Float16>(bits); }
inline uint16_t __half_as_ushort(_Float16 x) { return emulated_cast<uint16_t>(x); }
inline float __half2float(_Float16 x) { return x; }
inline _Float16 __float2half_rn(float x) { return static_cast<_Float16>(x); }
