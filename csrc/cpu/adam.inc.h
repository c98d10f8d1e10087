// Adam and AdamW, in torch's order of operations.

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

// x / y for many x, correctly rounded.
template <class C>
struct Divisor {
  C y;

  explicit Divisor(double value) : y(C(value)) {}
  C divide(C x) const { return x / y; }
};

#if defined(__FMA__)
// The same in three multiplications: the machine's dividers, which the square root and the other division keep busy,
// are what Adam waits for. The remainder of the first guess is exact in a fused multiply-add and corrects it.
template <>
struct Divisor<float> {
  float y, inverse;

  explicit Divisor(double value) : y(float(value)), inverse(1 / y) {}
  float divide(float x) const {
    const float guess = x * inverse;
    const float better = __builtin_fmaf(__builtin_fmaf(-guess, y, x), inverse, guess);
    // An infinite or NaN x has no remainder.
    return x < __builtin_inff() ? better : guess;
  }
};
#endif

// a where all bits of `which` are set, b where none is. A conditional on a constant of the loop would keep it from
// becoming vectors.
template <class C>
inline C select(typename IntegerOf<C>::Type which, C a, C b) {
  using Integer = typename IntegerOf<C>::Type;
  const Integer bits_a = __builtin_bit_cast(Integer, a), bits_b = __builtin_bit_cast(Integer, b);
  return __builtin_bit_cast(C, (bits_a & which) | (bits_b & ~which));
}

template <class S>
struct Adam {
  using C = typename Compute<S>::Type;
  static constexpr bool kReadsGrad = true;

  Adam(const Job& job, int32_t tensor)
      : param(static_cast<S*>(job.addresses[kParam][tensor])),
        mean(static_cast<S*>(job.addresses[kState0][tensor])),
        square(static_cast<S*>(job.addresses[kState1][tensor])),
        top(static_cast<S*>(job.addresses[kState2][tensor])),
        lerp(C(1 - job.hyper.beta1)),
        beta2(C(job.hyper.beta2)),
        fresh(C(1 - job.hyper.beta2)),
        eps(C(job.hyper.eps)),
        step_size(C(job.bias[tensor].step_size)),
        root(job.bias[tensor].root),
        low(1 - job.hyper.beta1 < 0.5),
        decoupled(job.hyper.decoupled),
        amsgrad(job.hyper.amsgrad) {}

  template <class Decay, class Decline, class Statistics>
  void update(int64_t at, int64_t n, const C* d, Decay decay, Decline decline, Statistics statistics) const {
    if (decoupled) {
      choose<true>(at, n, d, decay, decline, statistics);
    } else if (is_nothing(decay)) {
      choose<false>(at, n, d, NoDecay<C>(), decline, statistics);
    } else {
      choose<false>(at, n, d, decay, decline, statistics);
    }
  }

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

  // Elements to take at once.
  int64_t longest() const { return fuses() ? INT64_MAX : kBlock; }

 private:
  // Whether one loop takes the statistics and makes the update: where the registers suffice for both.
  bool fuses() const { return kVectorBytes == 64 && !amsgrad; }

  template <bool kDecoupled, class Decay, class Decline, class Statistics>
  void choose(int64_t at, int64_t n, const C* d, Decay decay, Decline decline, Statistics statistics) const {
    if constexpr (kVectorBytes == 64) {
      if (fuses()) return loop<kDecoupled, false>(at, n, d, decay, decline, statistics);
    }
    look(n, param + at, d, statistics);
    amsgrad ? loop<kDecoupled, true>(at, n, d, decay, decline, NoStatistics())
            : loop<kDecoupled, false>(at, n, d, decay, decline, NoStatistics());
  }

  template <bool kDecoupled, bool kAmsgrad, class Decay, class Decline, class Statistics>
  void loop(int64_t at, int64_t n, const C* __restrict ds, Decay decay, Decline decline, Statistics statistics) const {
    S* __restrict ws = param + at;
    S* __restrict ms = mean + at;
    S* __restrict vs = square + at;
    S* __restrict ts = kAmsgrad ? top + at : nullptr;
    const C b2 = beta2, f2 = fresh, e = eps, step = step_size;
    const Divisor<C> scale = root;
    // torch.lerp has two formulas, chosen by its weight so that both of its ends are exact: from either end on, by its
    // share of the way.
    using Integer = typename IntegerOf<C>::Type;
    const Integer from_mean = low ? -1 : 0;
    const C share = low ? lerp : -(C(1) - lerp);
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
      const C m = select(from_mean, old_m, d) + share * (d - old_m);
      const C v = old_v * b2 + d * f2 * d;
      C t = v;
      if constexpr (kAmsgrad) {
        const C old_t = widen(ts[i]);
        t = v > old_t || v != v ? v : old_t;
        narrow(decline.state(i, t, old_t), &ts[i]);
      }
      const C denominator = scale.divide(square_root(t)) + e;
      narrow(decline.weight(i, w - step * m / denominator, old_w), &ws[i]);
      narrow(decline.state(i, m, old_m), &ms[i]);
      narrow(decline.state(i, v, old_v), &vs[i]);
    });
  }

  S* param;
  S* mean;
  S* square;
  S* top;
  C lerp, beta2, fresh, eps, step_size;
  Divisor<C> root;
  bool low, decoupled, amsgrad;
};
