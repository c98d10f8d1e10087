// Adam and AdamW, in torch's order of operations.

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

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
        root(C(job.bias[tensor].root)),
        low(1 - job.hyper.beta1 < 0.5),
        decoupled(job.hyper.decoupled),
        amsgrad(job.hyper.amsgrad) {}

  void update(int64_t at, int64_t n, const C* d, Same<C> decay, SameDecline<C> decline) const {
    if (!decoupled && decay.value == 0) {
      choose<false>(at, n, d, NoDecay<C>(), decline);
    } else {
      choose_decay(at, n, d, decay, decline);
    }
  }

  void update(int64_t at, int64_t n, const C* d, const C* decay, EachDecline<C> decline) const {
    choose_decay(at, n, d, decay, decline);
  }

  void masked(int64_t, int64_t) const {}

  void end(int64_t at, int64_t n) const {
    __builtin_memset(param + at, 0, n * sizeof(S));
    __builtin_memset(mean + at, 0, n * sizeof(S));
    __builtin_memset(square + at, 0, n * sizeof(S));
    if (amsgrad) __builtin_memset(top + at, 0, n * sizeof(S));
  }

  void prefetch(int64_t at) const {
    __builtin_prefetch(param + at, 1);
    __builtin_prefetch(mean + at, 1);
    __builtin_prefetch(square + at, 1);
    if (amsgrad) __builtin_prefetch(top + at, 1);
  }

 private:
  template <class Decay, class Decline>
  void choose_decay(int64_t at, int64_t n, const C* d, Decay decay, Decline decline) const {
    decoupled ? choose<true>(at, n, d, decay, decline) : choose<false>(at, n, d, decay, decline);
  }

  template <bool kDecoupled, class Decay, class Decline>
  void choose(int64_t at, int64_t n, const C* d, Decay decay, Decline decline) const {
    if (amsgrad) {
      low ? loop<kDecoupled, true, true>(at, n, d, decay, decline)
          : loop<kDecoupled, true, false>(at, n, d, decay, decline);
    } else {
      low ? loop<kDecoupled, false, true>(at, n, d, decay, decline)
          : loop<kDecoupled, false, false>(at, n, d, decay, decline);
    }
  }

  // kLow: torch.lerp has two formulas, chosen by its weight, so that both of its ends are exact.
  template <bool kDecoupled, bool kAmsgrad, bool kLow, class Decay, class Decline>
  void loop(int64_t at, int64_t n, const C* __restrict ds, Decay decay, Decline decline) const {
    S* __restrict ws = param + at;
    S* __restrict ms = mean + at;
    S* __restrict vs = square + at;
    S* __restrict ts = kAmsgrad ? top + at : nullptr;
    const C a = lerp, rest = C(1) - lerp, b2 = beta2, f2 = fresh, e = eps, step = step_size, scale = root;
    for (int64_t i = 0; i < n; ++i) {
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
      const C denominator = square_root(t) / scale + e;
      narrow(decline.weight(i, w - step * m / denominator, old_w), &ws[i]);
      narrow(decline.state(i, m, old_m), &ms[i]);
      narrow(decline.state(i, v, old_v), &vs[i]);
    }
  }

  S* param;
  S* mean;
  S* square;
  S* top;
  C lerp, beta2, fresh, eps, step_size, root;
  bool low, decoupled, amsgrad;
};
