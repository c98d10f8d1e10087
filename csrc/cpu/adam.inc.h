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

template <class S>
struct Adam {
  using C = typename Compute<S>::Type;
  static constexpr bool kReadsGrad = true;
  static constexpr bool kFuses = kVectorBytes == 64;

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

  template <class Statistics>
  void update(int64_t at, int64_t n, const C* d, Same<C> decay, SameDecline<C> decline, Statistics statistics) const {
    if (!decoupled && decay.value == 0) {
      choose<false>(at, n, d, NoDecay<C>(), decline, statistics);
    } else {
      choose_decay(at, n, d, decay, decline, statistics);
    }
  }

  void update(int64_t at, int64_t n, const C* d, const C* decay, EachDecline<C> decline) const {
    choose_decay(at, n, d, decay, decline, NoStatistics());
  }

  void masked(int64_t, int64_t) const {}

  void end(int64_t at, int64_t n) const {
    __builtin_memset(param + at, 0, n * sizeof(S));
    __builtin_memset(mean + at, 0, n * sizeof(S));
    __builtin_memset(square + at, 0, n * sizeof(S));
    if (amsgrad) __builtin_memset(top + at, 0, n * sizeof(S));
  }

  void prefetch(int64_t at) const {
    __builtin_prefetch(param + at);
    __builtin_prefetch(mean + at);
    __builtin_prefetch(square + at);
    if (amsgrad) __builtin_prefetch(top + at);
  }

 private:
  template <class... Rest>
  void choose_decay(int64_t at, int64_t n, const C* d, Rest... rest) const {
    decoupled ? choose<true>(at, n, d, rest...) : choose<false>(at, n, d, rest...);
  }

  template <bool kDecoupled, class... Rest>
  void choose(int64_t at, int64_t n, const C* d, Rest... rest) const {
    if (amsgrad) {
      low ? loop<kDecoupled, true, true>(at, n, d, rest...) : loop<kDecoupled, true, false>(at, n, d, rest...);
    } else {
      low ? loop<kDecoupled, false, true>(at, n, d, rest...) : loop<kDecoupled, false, false>(at, n, d, rest...);
    }
  }

  // kLow: torch.lerp has two formulas, chosen by its weight, so that both of its ends are exact.
  template <bool kDecoupled, bool kAmsgrad, bool kLow, class Decay, class Decline, class Statistics>
  void loop(int64_t at, int64_t n, const C* __restrict ds, Decay decay, Decline decline, Statistics statistics) const {
    S* __restrict ws = param + at;
    S* __restrict ms = mean + at;
    S* __restrict vs = square + at;
    S* __restrict ts = kAmsgrad ? top + at : nullptr;
    const C a = lerp, rest = C(1) - lerp, b2 = beta2, f2 = fresh, e = eps, step = step_size;
    const Divisor<C> scale = root;
    const auto prefetch = [=](int64_t i) SPARSEKERN_ALWAYS {
      __builtin_prefetch(ds + i);
      this->prefetch(at + i);
    };
    for_elements(n, ws, ds, statistics, prefetch, [=](int64_t i) SPARSEKERN_ALWAYS {
      const C old_w = widen(ws[i]), old_m = widen(ms[i]), old_v = widen(vs[i]);
      C w = old_w, d = ds[i];
      if constexpr (kDecoupled) {
        w = w * decay[i];
      } else if constexpr (kDecays<Decay>) {
        d = d + w * decay[i];
      }
      const C m = kLow ? old_m + a * (d - old_m) : d - (d - old_m) * rest;
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
