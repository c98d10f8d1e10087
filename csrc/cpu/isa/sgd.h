// SGD with momentum, dampening and Nesterov's momentum, in torch's order of operations.
#pragma once

#include "../../update.h"
#include "fused_update.h"

SPARSEKERN_BEGIN_ISA

// Shortest update without statistics that uses the loop without prefetch.
constexpr int64_t kUnrolled = 128;

// Without momentum; with it; with dampening or with Nesterov's momentum.
enum SgdMode { kPlain, kHeavyBall, kGeneral };

// The constants of a step and its arithmetic.
template <class C>
struct SgdStep {
  C lr, momentum, one_minus_dampening;
  // The step follows d + b * momentum for Nesterov's momentum, else -0 + b * 1, which is b.
  C look_ahead;
  typename IntegerOf<C>::Type nesterov;

  // Updates weights `w` and momentum buffers `b` by gradients `d`.
  template <SgdMode kMode, class Decay, class Place, class Vector>
  SPARSEKERN_INLINE void update(Vector& w, Vector& b, Vector d, Decay decay, Place place) const {
    d = add_decay(decay, place, d, w);
    if constexpr (kMode == kHeavyBall) {
      b = b * momentum + d;
      d = b;
    } else if constexpr (kMode == kGeneral) {
      b = b * momentum + d * one_minus_dampening;
      d = select(nesterov, d, Vectors<C>::repeat(C(-0.0))) + b * look_ahead;
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
        step(step_of(job.hyper)),
        mode(mode_of(job.hyper)),
        first(mode != kPlain && job.hyper.first),
        apart(__is_same(S, C) && job.apart) {}

  template <class D, class Decay, class Fade, class Statistics>
  void update(int64_t at, int64_t n, const D* d, Decay decay, Fade fade, Statistics statistics) const {
    if (first) start_buffer(at, n, fade);
    with_known_decay(decay, [&](auto known) { fused_or_apart(at, n, d, known, fade, statistics); });
  }

#if defined(__AVX2__)
  // Updates a run of rows from element `at` on and takes their statistics. Requires takes_row_runs().
  void update_rows(int64_t at, const S* ds, const RowRun& rows) const {
    for (int64_t r = 0; first && r < rows.count; ++r)
      start_buffer(at + rows.live[r] * rows.width, rows.width, NoFade());
    with_mode([&](auto mode) {
      with_step<mode.value>(at, [&](const auto& arrays, auto step)
                                    SPARSEKERN_ALWAYS { fused_update_rows<true>(rows, arrays, ds, step); });
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

  bool reads_stored_gradients() const { return true; }
  bool fuses_statistics() const { return kTakesStored<S> && !apart; }
  bool takes_row_runs() const { return kFusesRows<S>; }
  bool expands_row_values() const { return kHasRegisters<S>; }

 private:
  template <Mode kMode>
  struct Is {
    static constexpr Mode value = kMode;
  };

  template <class Work>
  void with_mode(Work work) const {
    switch (mode) {
      case kPlain: return work(Is<kPlain>());
      case kHeavyBall: return work(Is<kHeavyBall>());
      case kGeneral: return work(Is<kGeneral>());
    }
  }

  static SgdStep<C> step_of(const Hyper& hyper) {
    const bool nesterov = hyper.nesterov;
    return {C(hyper.lr), C(hyper.momentum), C(hyper.first ? 1 : 1 - hyper.dampening),
            nesterov ? C(hyper.momentum) : C(1), nesterov ? -1 : 0};
  }

  static SgdMode mode_of(const Hyper& hyper) {
    if (hyper.momentum == 0) return kPlain;
    return hyper.nesterov || (hyper.dampening != 0 && !hyper.first) ? kGeneral : kHeavyBall;
  }

  // In the first step the buffer becomes the gradient, whatever it holds. A buffer of -0 gives that with the arithmetic
  // of all other steps, even for a gradient of -0.
  template <class Fade>
  void start_buffer(int64_t at, int64_t n, Fade fade) const {
    S start;
    narrow(C(-0.0), &start);
    for (int64_t i = 0; i < n; ++i)
      if (!fade.masked(i)) buffer[at + i] = start;
  }

  // One loop takes the statistics and makes the update where there is one and `apart` does not ask for two. The fused
  // loop prefetches. An update without statistics does not need that, and it costs 25 % on lists that fit the
  // third-level cache.
  template <class D, class Decay, class Fade, class Statistics>
  void fused_or_apart(int64_t at, int64_t n, const D* d, Decay decay, Fade fade, Statistics statistics) const {
    constexpr bool kFused = kFuses<S, D, Statistics>;
    constexpr bool kUpdateAlone = __is_same(S, C) && __is_same(Fade, NoFade) && __is_same(Statistics, NoStatistics);
    constexpr bool kMayBeApart = __is_same(S, C) && kOfRows<Statistics>;
    if constexpr (kFused) {
      if (!(kUpdateAlone && n >= kUnrolled) && !(kMayBeApart && apart))
        return with_mode([&](auto mode) { fused<mode.value>(at, n, d, decay, fade, statistics); });
    }
    if constexpr (!kFused || kUpdateAlone || kMayBeApart) {
      accumulate_statistics(n, param + at, d, statistics);
      constexpr bool kAhead = !__is_same(Statistics, NoStatistics);
      with_mode([&](auto mode) { vectors<mode.value, kAhead>(at, n, d, decay, fade); });
    }
  }

  // Calls work(arrays, step) with the arrays from element `at` on and the update of a vector of their elements.
  template <Mode kMode, class Work>
  SPARSEKERN_INLINE void with_step(int64_t at, Work work) const {
    using Vector = typename Vectors<C>::Vector;
    const SgdStep<C> numbers = step;
    if constexpr (kMode == kPlain) {
      S* const arrays[] = {param + at};
      work(arrays, [=](auto place, auto decay, auto fade, const Vector(&old)[1], Vector d, Vector(&updated)[1])
                       SPARSEKERN_ALWAYS {
                         Vector w = old[0], unused;
                         numbers.template update<kMode>(w, unused, d, decay, place);
                         updated[0] = fade.weight(place, w, old[0]);
                       });
    } else {
      S* const arrays[] = {param + at, buffer + at};
      work(arrays, [=](auto place, auto decay, auto fade, const Vector(&old)[2], Vector d, Vector(&updated)[2])
                       SPARSEKERN_ALWAYS {
                         Vector w = old[0], b = old[1];
                         numbers.template update<kMode>(w, b, d, decay, place);
                         updated[0] = fade.weight(place, w, old[0]);
                         updated[1] = fade.state(place, b, old[1]);
                       });
    }
  }

  template <Mode kMode, class D, class Decay, class Fade, class Statistics>
  void fused(int64_t at, int64_t n, const D* ds, Decay decay, Fade fade, Statistics statistics) const {
    with_step<kMode>(at, [=](const auto& arrays, auto step)
                             SPARSEKERN_ALWAYS { fused_update(n, arrays, ds, decay, fade, statistics, step); });
  }

  // Not inlined, so that one copy serves all statistics.
  template <Mode kMode, bool kAhead, class D, class Decay, class Fade>
  __attribute__((noinline)) void vectors(int64_t at, int64_t n, const D* ds, Decay decay, Fade fade) const {
    with_step<kMode>(at, [=](const auto& arrays, auto step) SPARSEKERN_ALWAYS {
      vector_update<kAhead>(n, arrays, ds, [=](auto place, const auto& old, auto d, auto& updated) SPARSEKERN_ALWAYS {
        step(place, decay, fade, old, d, updated);
      });
    });
  }

  S* param;
  S* buffer;
  SgdStep<C> step;
  Mode mode;
  bool first, apart;
};

SPARSEKERN_END_ISA
