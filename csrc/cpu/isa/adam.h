// Adam and AdamW in torch's order of operations, with one exception: torch divides by the square root of the bias
// correction; this code multiplies by its reciprocal. The divider units limit the speed of Adam, and the square root
// and the other division already keep them busy.
#pragma once

#include "../../update.h"
#include "fused_update.h"

SPARSEKERN_BEGIN_ISA

// The constants of a step and its arithmetic.
template <class C>
struct AdamStep {
  C lerp_weight, beta2, one_minus_beta2, eps, size, inverse_root;
  typename IntegerOf<C>::Type lerp_from_start;

  // Decays weights `w` (or adds their decay to the gradient), and updates both moments by gradients `d`.
  template <bool kDecoupled, class Decay, class Place, class Vector>
  SPARSEKERN_INLINE void moments(Vector& w, Vector& m, Vector& v, Vector d, Decay decay, Place place) const {
    if constexpr (kDecoupled) {
      w = w * decay.vector(place);
    } else {
      d = add_decay(decay, place, d, w);
    }
    m = mean(m, d);
    v = square(v, d);
  }

  // torch.lerp has two formulas, chosen by its weight so that both ends are exact: start + weight * (end - start) below
  // 0.5, else end - (1 - weight) * (end - start).
  template <class Vector>
  SPARSEKERN_INLINE Vector mean(Vector old, Vector d) const {
    return select(lerp_from_start, old, d) + lerp_weight * (d - old);
  }
  template <class Vector>
  SPARSEKERN_INLINE Vector square(Vector old, Vector d) const {
    return old * beta2 + d * one_minus_beta2 * d;
  }
  template <class Vector>
  SPARSEKERN_INLINE Vector weight(Vector w, Vector mean, Vector square) const {
    return w - size * mean / (square_root(square) * inverse_root + eps);
  }
};

template <class S>
struct Adam {
  using C = typename Compute<S>::Type;
  static constexpr bool kReadsGrad = true, kTakesRowRuns = true;

  Adam(const Job& job, int32_t tensor)
      : param(static_cast<S*>(job.addresses[kParam][tensor])),
        mean(static_cast<S*>(job.addresses[kState0][tensor])),
        square(static_cast<S*>(job.addresses[kState1][tensor])),
        top(static_cast<S*>(job.addresses[kState2][tensor])),
        step(step_of(job.hyper, job.bias[tensor])),
        decoupled(job.hyper.decoupled),
        amsgrad(job.hyper.amsgrad),
        apart(__is_same(S, C) && job.apart) {}

  template <class D, class Decay, class Fade, class Statistics>
  void update(int64_t at, int64_t n, const D* d, Decay decay, Fade fade, Statistics statistics) const {
    if (decoupled) {
      with_decay<true>(at, n, d, decay, fade, statistics);
    } else {
      with_known_decay(decay, [&](auto known) { with_decay<false>(at, n, d, known, fade, statistics); });
    }
  }

#if defined(__AVX2__)
  // Updates a run of rows from element `at` on and takes their statistics. Requires takes_row_runs().
  void update_rows(int64_t at, const S* ds, const RowRun& rows) const {
    S* const arrays[] = {param + at, mean + at, square + at};
    decoupled ? fused_update_rows<false>(rows, arrays, ds, vector_step<true, 3>())
              : fused_update_rows<true>(rows, arrays, ds, vector_step<false, 3>());
  }
#endif

  void masked(int64_t, int64_t) const {}

  void end(int64_t at, int64_t n) const {
    __builtin_memset(param + at, 0, n * sizeof(S));
    __builtin_memset(mean + at, 0, n * sizeof(S));
    __builtin_memset(square + at, 0, n * sizeof(S));
    if (amsgrad) __builtin_memset(top + at, 0, n * sizeof(S));
  }

  void prefetch(int64_t at) const {
    prefetch_far(param + at);
    prefetch_far(mean + at);
    prefetch_far(square + at);
  }

  bool reads_stored_gradients() const { return !amsgrad; }
  bool fuses_statistics() const { return kTakesStored<S> && !amsgrad && !apart; }

  bool takes_row_runs() const { return kFusesRows<S> && !amsgrad; }

  // The loop reads one factor and one threshold for every four elements.
  bool expands_row_values() const { return kHasRegisters<S> && !amsgrad; }

 private:
  // One loop takes the statistics and makes the update where there is one, except with AMSGrad and if `apart` asks for
  // two.
  template <bool kDecoupled, class D, class Decay, class Fade, class Statistics>
  void with_decay(int64_t at, int64_t n, const D* d, Decay decay, Fade fade, Statistics statistics) const {
    if constexpr (__is_same(D, C)) {
      if (amsgrad) {
        accumulate_statistics(n, param + at, d, statistics);
        return vectors<kDecoupled, false, 4>(at, n, d, decay, fade);
      }
    }
    constexpr bool kFused = kFuses<S, D, Statistics>;
    constexpr bool kMayBeApart = __is_same(S, C) && kOfRows<Statistics>;
    if constexpr (kFused) {
      if (!kMayBeApart || !apart) return fused<kDecoupled>(at, n, d, decay, fade, statistics);
    }
    if constexpr (!kFused || kMayBeApart) {
      accumulate_statistics(n, param + at, d, statistics);
      vectors<kDecoupled, !__is_same(Statistics, NoStatistics), 3>(at, n, d, decay, fade);
    }
  }

  // The update of a vector of elements. The fourth array is the largest mean square so far, of AMSGrad.
  template <bool kDecoupled, int kArrays>
  SPARSEKERN_INLINE auto vector_step() const {
    using Vector = typename Vectors<C>::Vector;
    return [numbers = step](auto place, auto decay, auto fade, const Vector(&old)[kArrays], Vector d,
                            Vector(&updated)[kArrays]) SPARSEKERN_ALWAYS {
      Vector w = old[0], m = old[1], v = old[2];
      numbers.template moments<kDecoupled>(w, m, v, d, decay, place);
      Vector top = v;
      if constexpr (kArrays == 4) {
        const Vector old_top = old[3];
        top = ((v > old_top) | (v != v)) ? v : old_top;
        updated[3] = fade.state(place, top, old_top);
      }
      updated[0] = fade.weight(place, numbers.weight(w, m, top), old[0]);
      updated[1] = fade.state(place, m, old[1]);
      updated[2] = fade.state(place, v, old[2]);
    };
  }

  template <bool kDecoupled, class D, class Decay, class Fade, class Statistics>
  void fused(int64_t at, int64_t n, const D* ds, Decay decay, Fade fade, Statistics statistics) const {
    S* const arrays[] = {param + at, mean + at, square + at};
    fused_update(n, arrays, ds, decay, fade, statistics, vector_step<kDecoupled, 3>());
  }

  // Not inlined, so that one copy serves all statistics.
  template <bool kDecoupled, bool kAhead, int kArrays, class D, class Decay, class Fade>
  __attribute__((noinline)) void vectors(int64_t at, int64_t n, const D* ds, Decay decay, Fade fade) const {
    S* arrays[kArrays] = {param + at, mean + at, square + at};
    if constexpr (kArrays == 4) arrays[3] = top + at;
    vector_update<kAhead>(
        n, arrays, ds,
        [=, step = vector_step<kDecoupled, kArrays>()](auto place, const auto& old, auto d, auto& updated)
            SPARSEKERN_ALWAYS { step(place, decay, fade, old, d, updated); });
  }

  static AdamStep<C> step_of(const Hyper& hyper, const AdamBias& bias) {
    const C lerp = C(1 - hyper.beta1);
    const bool low = 1 - hyper.beta1 < 0.5;
    return {low ? lerp : -(C(1) - lerp), C(hyper.beta2),       C(1 - hyper.beta2), C(hyper.eps),
            C(bias.step_size),           C(bias.inverse_root), low ? -1 : 0};
  }

  S* param;
  S* mean;
  S* square;
  S* top;
  AdamStep<C> step;
  bool decoupled, amsgrad, apart;
};

SPARSEKERN_END_ISA
