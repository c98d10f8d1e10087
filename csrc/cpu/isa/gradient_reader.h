// The gradient of a chunk as an update wants it: in the compute type, unscaled, with the sign that is descended.
#pragma once

#include "../../abi.h"
#include "../../update.h"
#include "fused_update.h"

SPARSEKERN_BEGIN_ISA

inline int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

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

  // Calls work(d) with the gradient of n elements from `at` on. `fade` has one value for each of them, negative where
  // the row is masked and its stored gradient stays as it is; null where no row is masked.
  template <class Work>
  SPARSEKERN_INLINE void with_gradient(int64_t at, int64_t n, const C* fade, Work work) const {
    if constexpr (Update::kReadsGrad && kFusesStatistics<C> && !__is_same(S, C)) {
      if (direct()) return work(static_cast<const S*>(grad_ + at));
    }
    C buffer[kBufferSize];
    work(read(at, n, buffer, fade));
  }

  // Elements to take at once: what the first-level cache holds between statistics and update, or what the buffer of
  // the gradient holds.
  int64_t longest() const { return direct() && fuses_ ? INT64_MAX : kBlock; }

 private:
  static constexpr int64_t kBufferSize = kBlock + kLanes;

  // Whether the update reads the gradient where it lies, in whatever type.
  bool direct() const { return unmodified_ && (__is_same(S, C) || (kFusesStatistics<C> && fuses_)); }

  // Read where it lies if nothing has to be done to it, else put into `buffer`. An unscaled gradient is stored back,
  // as torch does it.
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
