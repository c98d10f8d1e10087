// Adam and AdamW, in torch's order of operations, but for one: torch divides by the root of the bias correction, here
// its reciprocal multiplies. The machine's dividers, which the square root and the other division keep busy, are what
// Adam waits for.

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

// a where all bits of `which` are set, b where none is. A conditional on a constant of the loop would keep it from
// becoming vectors.
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

// The numbers of a step and what it does with them, to one element or to a vector of them.
template <class C>
struct AdamStep {
  C share, beta2, fresh, eps, size, inverse_root;
  typename IntegerOf<C>::Type from_mean;

  // torch.lerp has two formulas, chosen by its weight so that both of its ends are exact: from either end on, by its
  // share of the way.
  template <class T>
  SPARSEKERN_INLINE T mean(T old, T d) const {
    return select(from_mean, old, d) + share * (d - old);
  }
  template <class T>
  SPARSEKERN_INLINE T square(T old, T d) const {
    return old * beta2 + d * fresh * d;
  }
  template <class T>
  SPARSEKERN_INLINE T weight(T w, T mean, T square) const {
    return w - size * mean / (square_root(square) * inverse_root + eps);
  }
};

template <class S>
struct Adam {
  using C = typename Compute<S>::Type;
  static constexpr bool kReadsGrad = true, kTakesRows = true;

  Adam(const Job& job, int32_t tensor)
      : param(static_cast<S*>(job.addresses[kParam][tensor])),
        mean(static_cast<S*>(job.addresses[kState0][tensor])),
        square(static_cast<S*>(job.addresses[kState1][tensor])),
        top(static_cast<S*>(job.addresses[kState2][tensor])),
        step(step_of(job.hyper, job.bias[tensor])),
        decoupled(job.hyper.decoupled),
        amsgrad(job.hyper.amsgrad) {}

  template <class D, class Decay, class Decline, class Statistics>
  void update(int64_t at, int64_t n, const D* d, Decay decay, Decline decline, Statistics statistics) const {
    if (decoupled) {
      choose<true>(at, n, d, decay, decline, statistics);
    } else if (is_nothing(decay)) {
      choose<false>(at, n, d, NoDecay<C>(), decline, statistics);
    } else {
      choose<false>(at, n, d, decay, decline, statistics);
    }
  }

#if defined(__AVX512F__)
  // Rows from `at` on, with their statistics, where spreads() says that whole registers are worked on.
  void update_rows(int64_t at, const S* ds, const RowRun& rows) const {
    S* const arrays[] = {param + at, mean + at, square + at};
    decoupled ? rows_in_turns(rows, arrays, ds, vector_step<true>())
              : rows_in_turns(rows, arrays, ds, vector_step<false>());
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

  // Whether one loop takes the statistics and makes the update: where the registers suffice for both.
  bool fuses() const { return kVectorBytes == 64 && !amsgrad; }

  // Whether the loop takes factors and thresholds of four elements together.
  bool spreads() const { return kInTurns<C> && !amsgrad; }

 private:
  template <bool kDecoupled, class D, class Decay, class Decline, class Statistics>
  void choose(int64_t at, int64_t n, const D* d, Decay decay, Decline decline, Statistics statistics) const {
    if constexpr (kInTurns<C> && __is_same(D, S)) {
      if (fuses()) return turns<kDecoupled>(at, n, d, decay, decline, statistics);
    }
    if constexpr (__is_same(D, C)) {
      if constexpr (kVectorBytes == 64 && sizeof(C) == 8) {
        if (fuses()) return loop<kDecoupled, false>(at, n, d, decay, decline, statistics);
      }
      look(n, param + at, d, statistics);
      amsgrad ? loop<kDecoupled, true>(at, n, d, decay, decline, NoStatistics())
              : loop<kDecoupled, false>(at, n, d, decay, decline, NoStatistics());
    }
  }

  // What is done to a vector of elements.
  template <bool kDecoupled>
  SPARSEKERN_INLINE auto vector_step() const {
    using Vector = typename Vectors<C>::Vector;
    return [numbers = step](int64_t i, auto decay, auto decline, const Vector(&old)[3], Vector d, Vector(&updated)[3])
               SPARSEKERN_ALWAYS {
                 Vector w = old[0];
                 if constexpr (kDecoupled) {
                   w = w * decay.vector(i);
                 } else if constexpr (kDecays<decltype(decay)>) {
                   d = d + w * decay.vector(i);
                 }
                 const Vector m = numbers.mean(old[1], d), v = numbers.square(old[2], d);
                 updated[0] = decline.weight(i, numbers.weight(w, m, v), old[0]);
                 updated[1] = decline.state(i, m, old[1]);
                 updated[2] = decline.state(i, v, old[2]);
               };
  }

  template <bool kDecoupled, class Decay, class Decline, class Statistics>
  void turns(int64_t at, int64_t n, const S* ds, Decay decay, Decline decline, Statistics statistics) const {
    S* const arrays[] = {param + at, mean + at, square + at};
    in_turns(n, arrays, ds, decay, decline, statistics, vector_step<kDecoupled>());
  }

  template <bool kDecoupled, bool kAmsgrad, class Decay, class Decline, class Statistics>
  void loop(int64_t at, int64_t n, const C* __restrict ds, Decay decay, Decline decline, Statistics statistics) const {
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
      C w = old_w, d = ds[i];
      if constexpr (kDecoupled) {
        w = w * decay[i];
      } else if constexpr (kDecays<Decay>) {
        d = d + w * decay[i];
      }
      const C m = numbers.mean(old_m, d);
      const C v = numbers.square(old_v, d);
      C t = v;
      if constexpr (kAmsgrad) {
        const C old_t = widen(ts[i]);
        t = v > old_t || v != v ? v : old_t;
        narrow(decline.state(i, t, old_t), &ts[i]);
      }
      narrow(decline.weight(i, numbers.weight(w, m, t), old_w), &ws[i]);
      narrow(decline.state(i, m, old_m), &ms[i]);
      narrow(decline.state(i, v, old_v), &vs[i]);
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
