// SGD with momentum, dampening and Nesterov's momentum, in torch's order of operations.
#pragma once

#include "../../update.h"
#include "fused_update.h"

SPARSEKERN_BEGIN_ISA

// Shortest update without statistics that uses the loop that the compiler unrolls.
constexpr int64_t kUnrolled = 128;

enum SgdMode { kPlain, kFirst, kFirstNesterov, kDampened, kHeavyBall, kNesterov };

// The constants of a step and its arithmetic, for one element or a vector of elements (T).
template <class C>
struct SgdStep {
  C lr, momentum, one_minus_dampening;

  // Updates weight `w` and momentum buffer `b` by gradient `d`.
  template <SgdMode kMode, bool kDecaysGradient, class T>
  SPARSEKERN_INLINE void update(T& w, T& b, T d, T decay) const {
    if constexpr (kDecaysGradient) d = d + w * decay;
    if constexpr (kMode != kPlain) {
      const T old = b;
      b = d;
      if constexpr (kMode == kDampened || kMode == kNesterov) b = old * momentum + d * one_minus_dampening;
      if constexpr (kMode == kHeavyBall) b = old * momentum + d;
      d = kMode == kNesterov || kMode == kFirstNesterov ? d + b * momentum : b;
    }
    w = w - d * lr;
  }
};

template <class S>
struct Sgd {
  using C = typename Compute<S>::Type;
  static constexpr bool kReadsGrad = true, kTakesRowRuns = true;
  using Mode = SgdMode;

  Sgd(const Job& job, int32_t tensor)
      : param(static_cast<S*>(job.addresses[kParam][tensor])),
        buffer(static_cast<S*>(job.addresses[kState0][tensor])),
        step{C(job.hyper.lr), C(job.hyper.momentum), C(1 - job.hyper.dampening)} {
    const bool nesterov = job.hyper.nesterov;
    if (job.hyper.momentum == 0) {
      mode = kPlain;
    } else if (job.hyper.first) {
      mode = nesterov ? kFirstNesterov : kFirst;
    } else {
      const bool dampened = job.hyper.dampening != 0;
      mode = nesterov ? kNesterov : dampened ? kDampened : kHeavyBall;
    }
  }

  template <class D, class Decay, class Fade, class Statistics>
  void update(int64_t at, int64_t n, const D* d, Decay decay, Fade fade, Statistics statistics) const {
    if (is_zero(decay)) {
      dispatch(at, n, d, NoDecay<C>(), fade, statistics);
    } else {
      dispatch(at, n, d, decay, fade, statistics);
    }
  }

#if defined(__AVX512F__)
  // Updates a run of rows from element `at` on and takes their statistics. Requires expands_row_values().
  void update_rows(int64_t at, const S* ds, const RowRun& rows) const {
    with_mode([&](auto mode) {
      with_step<mode.value>(
          at, [&](const auto& arrays, auto step) SPARSEKERN_ALWAYS { fused_update_rows(rows, arrays, ds, step); });
    });
  }
#endif

  void masked(int64_t, int64_t) const {}

  void end(int64_t at, int64_t n) const {
    __builtin_memset(param + at, 0, n * sizeof(S));
    if (mode != kPlain) __builtin_memset(buffer + at, 0, n * sizeof(S));
  }

  void prefetch(int64_t at) const {
    prefetch_far(param + at);
    if (mode != kPlain) prefetch_far(buffer + at);
  }

  bool fuses_statistics() const { return kFusesStatistics<C> && !__is_same(S, C); }
  bool expands_row_values() const { return kFusesStatistics<C>; }

 private:
  template <Mode kMode>
  struct Is {
    static constexpr Mode value = kMode;
  };

  template <class Work>
  void with_mode(Work work) const {
    switch (mode) {
      case kPlain: return work(Is<kPlain>());
      case kFirst: return work(Is<kFirst>());
      case kFirstNesterov: return work(Is<kFirstNesterov>());
      case kDampened: return work(Is<kDampened>());
      case kHeavyBall: return work(Is<kHeavyBall>());
      case kNesterov: return work(Is<kNesterov>());
    }
  }

  template <class D, class... Rest>
  void dispatch(int64_t at, int64_t n, const D* d, Rest... rest) const {
    with_mode([&](auto mode) { fused_or_apart<mode.value>(at, n, d, rest...); });
  }

  // One loop in registers takes the statistics and makes the update; two loops, the first of which fills the cache,
  // take up to 60 % longer. The fused loop prefetches. An update without statistics does not need that, and it costs 25
  // % on lists that fit the third-level cache, so such an update uses the compiler's loop if all its elements have one
  // fade.
  template <Mode kMode, class D, class Decay, class Fade, class Statistics>
  void fused_or_apart(int64_t at, int64_t n, const D* d, Decay decay, Fade fade, Statistics statistics) const {
    static_assert(kFusesStatistics<C> || __is_same(D, C), "gradients are widened where they lie by these loops alone");
    constexpr bool kUpdateAlone = __is_same(S, C) && kIsUniform<Fade> && __is_same(Statistics, NoStatistics);
    if constexpr (kFusesStatistics<C> && __is_same(D, S)) {
      if (!kUpdateAlone || n < kUnrolled) return registers<kMode>(at, n, d, decay, fade, statistics);
    }
    if constexpr (__is_same(D, C)) {
      accumulate_statistics(n, param + at, d, statistics);
      loop<kMode>(at, n, d, decay, fade);
    }
  }

  // Calls work(arrays, step) with the arrays from element `at` on and the update of a vector of their elements.
  template <Mode kMode, class Work>
  SPARSEKERN_INLINE void with_step(int64_t at, Work work) const {
    using Vector = typename Vectors<C>::Vector;
    const SgdStep<C> numbers = step;
    if constexpr (kMode == kPlain) {
      S* const arrays[] = {param + at};
      work(arrays, [=](int64_t i, auto decay, auto fade, const Vector(&old)[1], Vector d, Vector(&updated)[1])
                       SPARSEKERN_ALWAYS {
                         Vector w = old[0], unused;
                         numbers.template update<kMode, kDecays<decltype(decay)>>(w, unused, d, decay.vector(i));
                         updated[0] = fade.weight(i, w, old[0]);
                       });
    } else {
      S* const arrays[] = {param + at, buffer + at};
      work(arrays, [=](int64_t i, auto decay, auto fade, const Vector(&old)[2], Vector d, Vector(&updated)[2])
                       SPARSEKERN_ALWAYS {
                         Vector w = old[0], b = old[1];
                         numbers.template update<kMode, kDecays<decltype(decay)>>(w, b, d, decay.vector(i));
                         updated[0] = fade.weight(i, w, old[0]);
                         updated[1] = fade.state(i, b, old[1]);
                       });
    }
  }

  template <Mode kMode, class Decay, class Fade, class Statistics>
  void registers(int64_t at, int64_t n, const S* ds, Decay decay, Fade fade, Statistics statistics) const {
    with_step<kMode>(at, [=](const auto& arrays, auto step)
                             SPARSEKERN_ALWAYS { fused_update(n, arrays, ds, decay, fade, statistics, step); });
  }

  template <Mode kMode, class Decay, class Fade>
  void loop(int64_t at, int64_t n, const C* __restrict ds, Decay decay, Fade fade) const {
    S* __restrict ws = param + at;
    S* __restrict bs = kMode == kPlain ? nullptr : buffer + at;
    const SgdStep<C> numbers = step;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const C old_w = widen(ws[i]);
      C w = old_w, b{};
      if constexpr (kMode != kPlain) b = widen(bs[i]);
      const C old_b = b;
      numbers.template update<kMode, kDecays<Decay>>(w, b, C(ds[i]), C(decay[i]));
      if constexpr (kMode != kPlain) narrow(fade.state(i, b, old_b), &bs[i]);
      narrow(fade.weight(i, w, old_w), &ws[i]);
    }
  }

  S* param;
  S* buffer;
  SgdStep<C> step;
  Mode mode;
};

SPARSEKERN_END_ISA
