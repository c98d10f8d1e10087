// Storage types, their compute types and conversions, and small functions of numbers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "abi.h"

namespace sparsekern::cuda {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <class S>
struct Compute {
  using Type = float;
};
template <>
struct Compute<double> {
  using Type = double;
};

__device__ inline float widen(float x) {
  return x;
}
__device__ inline double widen(double x) {
  return x;
}
__device__ inline float widen(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ inline float widen(Float16 x) {
  return __half2float(__ushort_as_half(x.bits));
}

__device__ inline void narrow(float x, float* out) {
  *out = x;
}
__device__ inline void narrow(double x, double* out) {
  *out = x;
}
__device__ inline void narrow(float x, BFloat16* out) {
  out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ inline void narrow(float x, Float16* out) {
  out->bits = __half_as_ushort(__float2half_rn(x));
}

template <class T>
__device__ inline T minimum(T a, T b) {
  return a < b ? a : b;
}

// Correctly rounded, like every operation here.
__device__ inline float square_root(float x) {
  return sqrtf(x);
}
__device__ inline double square_root(double x) {
  return sqrt(x);
}

__device__ inline bool finite(float x) {
  constexpr uint32_t kExponent = 0x7f800000;
  return (__float_as_uint(x) & kExponent) != kExponent;
}
__device__ inline bool finite(double x) {
  return x - x == 0;
}

__device__ inline double read(const Scalar& scalar) {
  if (scalar.address == nullptr) return scalar.value;
  switch (scalar.dtype) {
    case kFloat32: return *static_cast<const float*>(scalar.address);
    case kFloat64: return *static_cast<const double*>(scalar.address);
    case kBFloat16: return widen(*static_cast<const BFloat16*>(scalar.address));
    default: return widen(*static_cast<const Float16*>(scalar.address));
  }
}

}  // namespace sparsekern::cuda
