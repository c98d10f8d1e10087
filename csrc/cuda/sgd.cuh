// SGD for one element, in torch's order of operations.
#pragma once

#include "../update.h"
#include "factors.cuh"

namespace sparsekern::cuda {

template <class S, bool kMomentum>
struct Sgd {
  using C = typename Compute<S>::Type;
  static constexpr int kStates = kMomentum ? 1 : 0;
  static constexpr bool kReadsGrad = true, kWrites = true, kClearsMasked = false;

  __device__ Sgd(const Table& table, const Entry&, const Conditions& conditions)
      : lr(static_cast<C>(conditions.lr)),
        momentum(static_cast<C>(table.hyper.momentum)),
        one_minus_dampening(static_cast<C>(1 - table.hyper.dampening)),
        first(table.hyper.first),
        nesterov(table.hyper.nesterov) {}

  // The first step does not use the contents of the momentum buffer.
  __device__ bool ignores_states() const { return first; }
  __device__ bool skips(const Factors<C>&) const { return false; }

  __device__ C operator()(C w, C d, C* state, const Factors<C>& row) const {
    if (row.decay != 0) d = d + w * row.decay;
    if (kMomentum) {
      const C buffer = first ? d : state[0] * momentum + d * one_minus_dampening;
      state[0] = buffer;
      d = nesterov ? d + buffer * momentum : buffer;
    }
    return w - d * lr;
  }

  C lr, momentum, one_minus_dampening;
  bool first, nesterov;
};

}  // namespace sparsekern::cuda
