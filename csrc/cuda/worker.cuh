// The work of one thread on an element or a pack of elements: loads everything once, takes statistics, applies the
// Update (csrc/update.h) and stores everything once.
#pragma once

#include "../update.h"
#include "factors.cuh"
#include "pack.cuh"
#include "sums.cuh"

namespace sparsekern::cuda {

template <class S, class Update>
class Worker {
 public:
  using C = typename Compute<S>::Type;
  static constexpr int kStates = Update::kStates > 0 ? Update::kStates : 1;

  // Packs of each list that a thread loads before it uses the first one. More take registers from other blocks, which
  // on short rows costs more than it brings (benchmarks/gpu_model). SGD with momentum has registers for a third in two
  // blocks. Adam in float64 would spill with a second.
  static constexpr int kLists = 1 + Update::kReadsGrad + Update::kStates;
  static constexpr int kAhead = kLists == 3 ? 3 : kLists > 3 && sizeof(S) == sizeof(double) ? 1 : 2;

  __device__ Worker(const Table& table, const Entry& entry, const Conditions& conditions)
      : entry_(entry),
        update_(table, entry, conditions),
        scale_(table.scaled ? static_cast<C>(read(table.grad_scale)) : C(1)),
        scaled_(table.scaled),
        maximize_(table.hyper.maximize),
        statistics(table.statistics && entry.start >= 0 && conditions.update_statistics) {}

  // Whether a row with these factors needs no work.
  __device__ bool skips(const Factors<C>& row) const {
    return (row.masked && !Update::kClearsMasked) || update_.skips(row);
  }

  // What a thread loads of the elements [at, at + kCount) of the tensor. kCount is 1, or the size of a pack if the
  // addresses of the parameter and of its states are aligned; that of the gradient need not be.
  template <int kCount>
  struct Loaded {
    Pack<S, kCount> weights, gradients, states[kStates];
  };

  template <int kCount>
  __device__ __forceinline__ Loaded<kCount> fetch(int64_t at, bool grad_aligned) const {
    Loaded<kCount> in = {load<kCount>(list(kParam) + at), {}, {}};
    if constexpr (Update::kReadsGrad) in.gradients = load<kCount>(list(kGrad) + at, grad_aligned);
#pragma unroll
    for (int s = 0; s < Update::kStates; ++s)
      if (!update_.ignores_states()) in.states[s] = load<kCount>(list(kState0 + s) + at);
    return in;
  }

  // Updates and stores elements [at, at + kCount), all of one row.
  template <int kCount>
  __device__ __forceinline__ void update(int64_t at, Loaded<kCount>& in, bool grad_aligned, const Factors<C>& row,
                                         C threshold, Sums<C>& sums) const {
    auto& [weights, gradients, states] = in;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const C w = widen(weights.values[k]);
      const C d = gradient(&gradients.values[k]);
      if (statistics) sums.add(w, d, threshold);
      if constexpr (Update::kWrites) {
        C state[kStates];
#pragma unroll
        for (int s = 0; s < Update::kStates; ++s) state[s] = widen(states[s].values[k]);
        const C updated = update_(w, d, state, row) * row.fade;
        const bool clear = row.ends || row.masked;
        narrow(clear ? C(0) : updated, &weights.values[k]);
#pragma unroll
        for (int s = 0; s < Update::kStates; ++s) narrow(clear ? C(0) : state[s], &states[s].values[k]);
      }
    }
    if constexpr (Update::kWrites) store(weights, list(kParam) + at);
#pragma unroll
    for (int s = 0; s < Update::kStates; ++s) store(states[s], list(kState0 + s) + at);
    if constexpr (Update::kReadsGrad)
      if (scaled_) store(gradients, list(kGrad) + at, grad_aligned);
  }

  template <int kCount>
  __device__ __forceinline__ void run(int64_t at, const Factors<C>& row, C threshold, Sums<C>& sums) const {
    Loaded<kCount> in = fetch<kCount>(at, entry_.grad_aligned);
    update<kCount>(at, in, entry_.grad_aligned, row, threshold, sums);
  }

 private:
  __device__ S* list(int slot) const { return static_cast<S*>(entry_.address[slot]); }

  // The gradient in the compute type, unscaled (and then stored unscaled), and negated if `maximize` is set.
  __device__ C gradient(S* stored) const {
    C d = widen(*stored);
    if (scaled_) {
      d = d / scale_;
      narrow(d, stored);
    }
    return maximize_ ? -d : d;
  }

  const Entry& entry_;
  Update update_;
  C scale_;
  bool scaled_, maximize_;

 public:
  const bool statistics;
};

}  // namespace sparsekern::cuda
