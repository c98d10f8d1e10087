// The activations and their gradients, in the order of operations of the reference
// (sparsekern/kernels/backends/reference/norm_act.py). The comparisons keep NaN.
#pragma once

#include "numbers.cuh"

namespace sparsekern::cuda {

__device__ inline float exponential(float x) {
  return expf(x);
}
__device__ inline double exponential(double x) {
  return exp(x);
}

template <class C>
__device__ inline C between_0_and_6(C z) {
  return z <= C(0) ? C(0) : z > C(6) ? C(6) : z;
}

template <class C>
__device__ inline C sigmoid(C z) {
  return C(1) / (C(1) + exponential(-z));
}

template <int32_t kActivation, class C>
__device__ inline C activate(C z) {
  if constexpr (kActivation == kRelu) return z <= C(0) ? C(0) : z;
  if constexpr (kActivation == kRelu6) return between_0_and_6(z);
  if constexpr (kActivation == kHardswish) return z * between_0_and_6(z + C(3)) * C(1.0 / 6);
  if constexpr (kActivation == kSilu) return z * sigmoid(z);
  return z;
}

// The gradient with respect to z, from that with respect to activate(z).
template <int32_t kActivation, class C>
__device__ inline C gradient_of(C grad, [[maybe_unused]] C z) {
  if constexpr (kActivation == kRelu) return z <= C(0) ? C(0) : grad;
  if constexpr (kActivation == kRelu6) return z <= C(0) || z >= C(6) ? C(0) : grad;
  if constexpr (kActivation == kHardswish)
    return z <= C(-3) ? C(0) : z < C(3) ? grad * (z * C(1.0 / 3) + C(0.5)) : grad;
  if constexpr (kActivation == kSilu) {
    const C s = sigmoid(z);
    return grad * (s * (C(1) + z * (C(1) - s)));
  }
  return grad;
}

}  // namespace sparsekern::cuda
