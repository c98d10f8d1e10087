// Reads the gradient of a chunk for an update: in the compute type, unscaled, and negated if `maximize` is set.
#pragma once

#include "../../abi.h"
#include "../../update.h"
#include "registers.h"
#include "vector_update.h"

SPARSEKERN_BEGIN_ISA

template <class S, class Update>
class GradientReader {
 public:
  using C = typename Compute<S>::Type;

  GradientReader(const Job& job, const Chunk& chunk, const Update& update)
      : hyper_(job.hyper),
        grad_(static_cast<S*>(job.addresses[kGrad][chunk.tensor])),
        unmodified_(!job.hyper.scaled && !job.hyper.maximize),
        stored_(update.reads_stored_gradients()),
        fuses_(update.fuses_statistics()) {}

  const S* stored(int64_t at) const { return grad_ + at; }

  // Whether the gradient is used as it is stored: no scale, no change of sign.
  bool unmodified() const { return unmodified_; }

  // Calls work(d) with the gradient of n elements from `at` on. `fade` has one value for each of them; a negative one
  // marks a masked row, whose stored gradient is not changed. `fade` is null if no row is masked. `kStored` says
  // whether work() also takes gradients in their storage type.
  template <bool kStored, class Work>
  SPARSEKERN_INLINE void with_gradient(int64_t at, int64_t n, const C* fade, Work work) const {
    if constexpr (Update::kReadsGrad && kStored && !__is_same(S, C)) {
      if (direct()) return work(static_cast<const S*>(grad_ + at));
    }
    C buffer[kBufferSize];
    work(read(at, n, buffer, fade));
  }

  // Maximum number of elements per call: as many as stay in the first-level cache between statistics and update, or as
  // many as the gradient's buffer holds.
  int64_t longest() const { return direct() && fuses_ ? INT64_MAX : kBlock; }

 private:
  using V = Vectors<C>;
  static constexpr int64_t kBufferSize = kBlock + kLanes;

  // Whether the update reads the gradient in place, in its storage type.
  bool direct() const { return unmodified_ && (__is_same(S, C) || stored_); }

  // Returns the stored gradient if it can be used unchanged, else a converted copy in `buffer`. An unscaled gradient is
  // also stored back, as in torch.
  const C* read(int64_t at, int64_t n, C* buffer, const C* fade) const {
    if constexpr (!Update::kReadsGrad) return nullptr;
    if constexpr (__is_same(S, C)) {
      if (unmodified_) return grad_ + at;
    }
    S* stored = grad_ + at;
    const C scale = hyper_.scaled ? C(hyper_.grad_scale) : C(1);
    for_vectors(n, stored, [&](const S* from, int64_t i) SPARSEKERN_ALWAYS {
      // A division by 1 would change nothing, but take time.
      V::store(hyper_.scaled ? V::load(from) / scale : V::load(from), buffer + i);
    });
    if (hyper_.scaled) {
      int64_t i = 0;
      for (; !fade && i + V::kWidth <= n; i += V::kWidth) V::store(V::load(buffer + i), stored + i);
      for (; i < n; ++i)
        if (!fade || fade[i] >= 0) narrow(buffer[i], &stored[i]);
    }
    if (hyper_.maximize)
      for (int64_t i = 0; i < n; ++i) buffer[i] = -buffer[i];
    return buffer;
  }

  // Calls work(from, i) for the vectors of n elements; the last one may be a copy, padded with zeros.
  template <class Work>
  static void for_vectors(int64_t n, const S* from, Work work) {
    int64_t i = 0;
    for (; i + V::kWidth <= n; i += V::kWidth) work(from + i, i);
    if (i == n) return;
    S copy[V::kWidth] = {};
    for (int64_t l = 0; i + l < n; ++l) copy[l] = from[i + l];
    work(copy, i);
  }

  const Hyper& hyper_;
  S* grad_;
  bool unmodified_, stored_, fuses_;
};

SPARSEKERN_END_ISA
