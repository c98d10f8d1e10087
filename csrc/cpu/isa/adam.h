// Adam and AdamW in torch's order of operations, with one exception: torch divides by the square root of the bias
// correction; this code multiplies by its reciprocal. The divider units limit the speed of Adam, and the square root
// and the other division already keep them busy.
#pragma once

#include "../../update.h"
#include "fused_update.h"

SPARSEKERN_BEGIN_ISA

inline float square_root(float x) {
  return __builtin_sqrtf(x);
}
inline double square_root(double x) {
  return __builtin_sqrt(x);
}

#if defined(__AVX512F__)
using Floats = Vectors<float>::Vector;

SPARSEKERN_INLINE Floats square_root(Floats x) {
  return (Floats)_mm512_sqrt_ps((__m512)x);
}
#endif

// Returns `a` if all bits of `which` are set and `b` if none is. A conditional expression on a loop constant would keep
// the compiler from vectorising the loop.
template <class C>
inline C select(typename IntegerOf<C>::Type which, C a, C b) {
  using Integer = typename IntegerOf<C>::Type;
  const Integer bits_a = __builtin_bit_cast(Integer, a), bits_b = __builtin_bit_cast(Integer, b);
  return __builtin_bit_cast(C, (bits_a & which) | (bits_b & ~which));
}

#if defined(__AVX512F__)
SPARSEKERN_INLINE Floats select(Vectors<float>::Integer which, Floats a, Floats b) {
  return (Floats)_mm512_mask_blend_ps(__mmask16(which), (__m512)b, (__m512)a);
}
#endif

// The constants of a step and its arithmetic, for one element or a vector of elements (T).
template <class C>
struct AdamStep {
  C lerp_weight, beta2, one_minus_beta2, eps, size, inverse_root;
  typename IntegerOf<C>::Type lerp_from_start;

  // Decays weight `w` (or adds its decay to the gradient), and updates both moments by gradient `d`.
  template <bool kDecoupled, bool kDecaysGradient, class T>
  SPARSEKERN_INLINE void moments(T& w, T& m, T& v, T d, T decay) const {
    if constexpr (kDecoupled) {
      w = w * decay;
    } else if constexpr (kDecaysGradient) {
      d = d + w * decay;
    }
    m = mean(m, d);
    v = square(v, d);
  }

  // torch.lerp has two formulas, chosen by its weight so that both ends are exact: start + weight * (end - start) below
  // 0.5, else end - (1 - weight) * (end - start).
  template <class T>
  SPARSEKERN_INLINE T mean(T old, T d) const {
    return select(lerp_from_start, old, d) + lerp_weight * (d - old);
  }
  template <class T>
  SPARSEKERN_INLINE T square(T old, T d) const {
    return old * beta2 + d * one_minus_beta2 * d;
  }
  template <class T>
  SPARSEKERN_INLINE T weight(T w, T mean, T square) const {
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
        amsgrad(job.hyper.amsgrad) {}

  template <class D, class Decay, class Fade, class Statistics>
  void update(int64_t at, int64_t n, const D* d, Decay decay, Fade fade, Statistics statistics) const {
    if (decoupled) {
      with_decay<true>(at, n, d, decay, fade, statistics);
    } else if (is_zero(decay)) {
      with_decay<false>(at, n, d, NoDecay<C>(), fade, statistics);
    } else {
      with_decay<false>(at, n, d, decay, fade, statistics);
    }
  }

#if defined(__AVX512F__)
  // Updates a run of rows from element `at` on and takes their statistics. Requires expands_row_values().
  void update_rows(int64_t at, const S* ds, const RowRun& rows) const {
    S* const arrays[] = {param + at, mean + at, square + at};
    decoupled ? fused_update_rows(rows, arrays, ds, vector_step<true>())
              : fused_update_rows(rows, arrays, ds, vector_step<false>());
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

  // One loop takes the statistics and makes the update, if there are enough registers for both.
  bool fuses_statistics() const { return kVectorBytes == 64 && !amsgrad; }

  // The loop reads one factor and one threshold for every four elements.
  bool expands_row_values() const { return kFusesStatistics<C> && !amsgrad; }

 private:
  template <bool kDecoupled, class D, class Decay, class Fade, class Statistics>
  void with_decay(int64_t at, int64_t n, const D* d, Decay decay, Fade fade, Statistics statistics) const {
    if constexpr (kFusesStatistics<C> && __is_same(D, S)) {
      if (fuses_statistics()) return fused<kDecoupled>(at, n, d, decay, fade, statistics);
    }
    if constexpr (__is_same(D, C)) {
      if constexpr (kVectorBytes == 64 && sizeof(C) == 8) {
        if (fuses_statistics()) return loop<kDecoupled, false>(at, n, d, decay, fade, statistics);
      }
      accumulate_statistics(n, param + at, d, statistics);
      amsgrad ? loop<kDecoupled, true>(at, n, d, decay, fade, NoStatistics())
              : loop<kDecoupled, false>(at, n, d, decay, fade, NoStatistics());
    }
  }

  // The update of a vector of elements.
  template <bool kDecoupled>
  SPARSEKERN_INLINE auto vector_step() const {
    using Vector = typename Vectors<C>::Vector;
    return [numbers = step](int64_t i, auto decay, auto fade, const Vector(&old)[3], Vector d, Vector(&updated)[3])
               SPARSEKERN_ALWAYS {
                 Vector w = old[0], m = old[1], v = old[2];
                 constexpr bool kDecaysGradient = kDecays<decltype(decay)>;
                 numbers.template moments<kDecoupled, kDecaysGradient>(w, m, v, d, decay.vector(i));
                 updated[0] = fade.weight(i, numbers.weight(w, m, v), old[0]);
                 updated[1] = fade.state(i, m, old[1]);
                 updated[2] = fade.state(i, v, old[2]);
               };
  }

  template <bool kDecoupled, class Decay, class Fade, class Statistics>
  void fused(int64_t at, int64_t n, const S* ds, Decay decay, Fade fade, Statistics statistics) const {
    S* const arrays[] = {param + at, mean + at, square + at};
    fused_update(n, arrays, ds, decay, fade, statistics, vector_step<kDecoupled>());
  }

  template <bool kDecoupled, bool kAmsgrad, class Decay, class Fade, class Statistics>
  void loop(int64_t at, int64_t n, const C* __restrict ds, Decay decay, Fade fade, Statistics statistics) const {
    S* __restrict ws = param + at;
    S* __restrict ms = mean + at;
    S* __restrict vs = square + at;
    S* __restrict ts = kAmsgrad ? top + at : nullptr;
    const AdamStep<C> numbers = step;
    const auto prefetch = [=](int64_t i) SPARSEKERN_ALWAYS {
      __builtin_prefetch(ws + i);
      __builtin_prefetch(ds + i);
      __builtin_prefetch(ms + i);
      __builtin_prefetch(vs + i);
    };
    for_elements(n, ws, ds, statistics, prefetch, [=](int64_t i) SPARSEKERN_ALWAYS {
      const C old_w = widen(ws[i]), old_m = widen(ms[i]), old_v = widen(vs[i]);
      C w = old_w, m = old_m, v = old_v;
      numbers.template moments<kDecoupled, kDecays<Decay>>(w, m, v, C(ds[i]), C(decay[i]));
      C t = v;
      if constexpr (kAmsgrad) {
        const C old_t = widen(ts[i]);
        t = v > old_t || v != v ? v : old_t;
        narrow(fade.state(i, t, old_t), &ts[i]);
      }
      narrow(fade.weight(i, numbers.weight(w, m, t), old_w), &ws[i]);
      narrow(fade.state(i, m, old_m), &ms[i]);
      narrow(fade.state(i, v, old_v), &vs[i]);
    });
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
  bool decoupled, amsgrad;
};

SPARSEKERN_END_ISA
