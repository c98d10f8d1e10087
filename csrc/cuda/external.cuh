// The two passes around the step of an optimizer that knows nothing of rows.
#pragma once

#include "factors.cuh"

namespace sparsekern::cuda {

// Statistics alone, before it.
template <class S>
struct ExternalStatistics {
  using C = typename Compute<S>::Type;
  static constexpr int kStates = 0;
  static constexpr bool kReadsGrad = true, kWrites = false, kClearsMasked = false;

  __device__ ExternalStatistics(const Table&, const Entry&, const Conditions&) {}
  __device__ bool ignores_states() const { return false; }
  __device__ bool leaves(const Factors<C>&) const { return false; }
  __device__ C operator()(C w, C, C*, const Factors<C>&) const { return w; }
};

// Penalty, fade and mask, after it: masked rows are set to 0, since that step may have moved them.
template <class S>
struct ExternalMask {
  using C = typename Compute<S>::Type;
  static constexpr int kStates = 0;
  static constexpr bool kReadsGrad = false, kWrites = true, kClearsMasked = true;

  __device__ ExternalMask(const Table&, const Entry& entry, const Conditions&) : tracked(entry.start >= 0) {}
  __device__ bool ignores_states() const { return false; }
  // Most rows ask for nothing: leave their memory alone.
  __device__ bool leaves(const Factors<C>& row) const {
    return !tracked || (row.decay == C(1) && row.fade == C(1) && !row.masked);
  }
  __device__ C operator()(C w, C, C*, const Factors<C>& row) const { return w * row.decay; }

  bool tracked;
};

}  // namespace sparsekern::cuda
