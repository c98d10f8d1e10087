// The two passes around the step of an external optimizer: statistics before it, penalty, fade and mask after it.
#pragma once

#include "../update.h"
#include "factors.cuh"

namespace sparsekern::cuda {

// Before the step: statistics.
template <class S>
struct ExternalStatistics {
  using C = typename Compute<S>::Type;
  static constexpr int kStates = 0;
  static constexpr bool kReadsGrad = true, kWrites = false, kClearsMasked = false;

  __device__ ExternalStatistics(const Table&, const Entry&, const Conditions&) {}
  __device__ bool ignores_states() const { return false; }
  __device__ bool skips(const Factors<C>&) const { return false; }
  __device__ C operator()(C w, C, C*, const Factors<C>&) const { return w; }
};

// After the step: penalty, fade and mask. Masked rows are set to 0, because the optimizer may have changed them.
template <class S>
struct ExternalMask {
  using C = typename Compute<S>::Type;
  static constexpr int kStates = 0;
  static constexpr bool kReadsGrad = false, kWrites = true, kClearsMasked = true;

  __device__ ExternalMask(const Table&, const Entry& entry, const Conditions&) : tracked(entry.start >= 0) {}
  __device__ bool ignores_states() const { return false; }
  // Most rows have no penalty and no fade; their memory is not touched.
  __device__ bool skips(const Factors<C>& row) const {
    return !tracked || (row.decay == C(1) && row.fade == C(1) && !row.masked);
  }
  __device__ C operator()(C w, C, C*, const Factors<C>& row) const { return w * row.decay; }

  bool tracked;
};

}  // namespace sparsekern::cuda
