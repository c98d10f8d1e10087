// Adam and AdamW for one element, in torch's order of operations with one exception: the code multiplies by the
// reciprocal square root of the bias correction (csrc/cpu/isa/adam.h says why).
#pragma once

#include "../update.h"
#include "factors.cuh"

namespace sparsekern::cuda {

// 1 - beta^count. -expm1(count * log(beta)) has fewer instructions than a power and is more accurate than the
// difference. In float64 that difference shows, so the formula of the reference stays.
template <class C>
__device__ inline double bias_correction(double beta, double log_beta, double count) {
  if constexpr (sizeof(C) == sizeof(double)) {
    return 1 - pow(beta, count);
  } else {
    return -expm1(count * log_beta);
  }
}

// Bias corrections in float64. They take longer than an element, so the first thread of each of two warps computes one,
// with its division or root. Called by whole blocks.
template <class C>
struct AdamBias {
  double step_size, inverse_root;

  __device__ AdamBias(const Table& table, const float* step, double lr) {
    __shared__ double shared[2];
    if (threadIdx.x % kWarp == 0 && threadIdx.x < 2 * kWarp) {
      const double count = *step + 1.0f;
      if (threadIdx.x == 0) {
        shared[0] = lr / bias_correction<C>(table.hyper.beta1, table.log_beta1, count);
      } else {
        shared[1] = 1 / sqrt(bias_correction<C>(table.hyper.beta2, table.log_beta2, count));
      }
    }
    __syncthreads();
    step_size = shared[0];
    inverse_root = shared[1];
  }
};

template <class S, bool kAmsgrad>
struct Adam {
  using C = typename Compute<S>::Type;
  static constexpr int kStates = kAmsgrad ? 3 : 2;
  static constexpr bool kReadsGrad = true, kWrites = true, kClearsMasked = false;

  __device__ Adam(const Table& table, const Entry& entry, const Conditions& conditions)
      : beta2(static_cast<C>(table.hyper.beta2)),
        one_minus_beta2(static_cast<C>(1 - table.hyper.beta2)),
        eps(static_cast<C>(table.hyper.eps)),
        lerp_from_start(1 - table.hyper.beta1 < 0.5),
        decoupled(table.hyper.decoupled) {
    const AdamBias<C> bias(table, entry.step, conditions.lr);
    step_size = static_cast<C>(bias.step_size);
    inverse_root = static_cast<C>(bias.inverse_root);
    // torch.lerp has two formulas, chosen by its weight so that both ends are exact: start + weight * (end - start)
    // below 0.5, else end - (1 - weight) * (end - start).
    const C weight = static_cast<C>(1 - table.hyper.beta1);
    lerp_weight = lerp_from_start ? weight : -(C(1) - weight);
  }

  __device__ bool ignores_states() const { return false; }
  __device__ bool skips(const Factors<C>&) const { return false; }

  __device__ C operator()(C w, C d, C* state, const Factors<C>& row) const {
    if (decoupled) {
      w = w * row.decay;
    } else if (row.decay != 0) {
      d = d + w * row.decay;
    }
    const C old = state[0];
    state[0] = (lerp_from_start ? old : d) + lerp_weight * (d - old);
    C top = state[1] = state[1] * beta2 + d * one_minus_beta2 * d;
    if (kAmsgrad) {
      C& highest = state[kStates - 1];
      top = highest = top > highest || top != top ? top : highest;
    }
    return w - step_size * state[0] / (square_root(top) * inverse_root + eps);
  }

  C lerp_weight, beta2, one_minus_beta2, eps, step_size, inverse_root;
  bool lerp_from_start, decoupled;
};

}  // namespace sparsekern::cuda
