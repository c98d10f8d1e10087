// Reads the gradient of a chunk for an update: in the compute type, unscaled, and negated if `maximize` is set.
#pragma once

#include "../../abi.h"
#include "../../update.h"
#include "fused_update.h"

SPARSEKERN_BEGIN_ISA

template <class S, class Update>
class GradientReader {
 public:
  using C = typename Compute<S>::Type;

  GradientReader(const Job& job, const Chunk& chunk, const Update& update)
      : hyper_(job.hyper),
        grad_(static_cast<S*>(job.addresses[kGrad][chunk.tensor])),
        unmodified_(!job.hyper.scaled && !job.hyper.maximize),
        fuses_(update.fuses_statistics()) {}

  const S* stored(int64_t at) const { return grad_ + at; }

  // Whether the gradient is used as it is stored: no scale, no change of sign.
  bool unmodified() const { return unmodified_; }

  // Calls work(d) with the gradient of n elements from `at` on. `fade` has one value for each of them; a negative one
  // marks a masked row, whose stored gradient is not changed. `fade` is null if no row is masked.
  template <class Work>
  SPARSEKERN_INLINE void with_gradient(int64_t at, int64_t n, const C* fade, Work work) const {
    if constexpr (Update::kReadsGrad && kFusesStatistics<C> && !__is_same(S, C)) {
      if (direct()) return work(static_cast<const S*>(grad_ + at));
    }
    C buffer[kBufferSize];
    work(read(at, n, buffer, fade));
  }

  // Maximum number of elements per call: as many as stay in the first-level cache between statistics and update, or as
  // many as the gradient's buffer holds.
  int64_t longest() const { return direct() && fuses_ ? INT64_MAX : kBlock; }

 private:
  static constexpr int64_t kBufferSize = kBlock + kLanes;

  // Whether the update reads the gradient in place, in its storage type.
  bool direct() const { return unmodified_ && (__is_same(S, C) || (kFusesStatistics<C> && fuses_)); }

  // Returns the stored gradient if it can be used unchanged, else a converted copy in `buffer`. An unscaled gradient is
  // also stored back, as in torch.
  const C* read(int64_t at, int64_t n, C* buffer, const C* fade) const {
    if constexpr (!Update::kReadsGrad) return nullptr;
    if constexpr (__is_same(S, C)) {
      if (unmodified_) return grad_ + at;
    }
    S* __restrict stored = grad_ + at;
    C* __restrict out = buffer;
    if (hyper_.scaled) {
      const C scale = C(hyper_.grad_scale);
      for (int64_t i = 0; i < n; ++i) out[i] = widen(stored[i]) / scale;
      for (int64_t i = 0; i < n; ++i)
        if (!fade || fade[i] >= 0) narrow(out[i], &stored[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] = widen(stored[i]);
    }
    if (hyper_.maximize)
      for (int64_t i = 0; i < n; ++i) out[i] = -out[i];
    return out;
  }

  const Hyper& hyper_;
  S* grad_;
  bool unmodified_, fuses_;
};

SPARSEKERN_END_ISA
