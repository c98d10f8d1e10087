// SGD, in torch's order of operations.

// Fewest elements whose update, without statistics, is left to the compiler's unrolling.
constexpr int64_t kUnrolled = 128;

template <class S>
struct Sgd {
  using C = typename Compute<S>::Type;
  static constexpr bool kReadsGrad = true, kTakesRows = true;
  enum Mode { kPlain, kFirst, kFirstNesterov, kDampened, kHeavyBall, kNesterov };

  Sgd(const Job& job, int32_t tensor)
      : param(static_cast<S*>(job.addresses[kParam][tensor])),
        buffer(static_cast<S*>(job.addresses[kState0][tensor])),
        lr(C(job.hyper.lr)),
        momentum(C(job.hyper.momentum)),
        fresh(C(1 - job.hyper.dampening)) {
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

  template <class D, class Decay, class Decline, class Statistics>
  void update(int64_t at, int64_t n, const D* d, Decay decay, Decline decline, Statistics statistics) const {
    if (is_nothing(decay)) {
      choose(at, n, d, NoDecay<C>(), decline, statistics);
    } else {
      choose(at, n, d, decay, decline, statistics);
    }
  }

#if defined(__AVX512F__)
  // Rows from `at` on, with their statistics, where spreads() says that whole registers are worked on.
  void update_rows(int64_t at, const S* ds, const RowRun& rows) const {
    with_mode([&](auto mode) {
      with_step<mode.value>(
          at, [&](const auto& arrays, auto step) SPARSEKERN_ALWAYS { rows_in_turns(rows, arrays, ds, step); });
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

  bool fuses() const { return kInTurns<C> && !__is_same(S, C); }
  bool spreads() const { return kInTurns<C>; }

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
  void choose(int64_t at, int64_t n, const D* d, Rest... rest) const {
    with_mode([&](auto mode) { turns<mode.value>(at, n, d, rest...); });
  }

  // One loop in registers for statistics and update: two, of which the first fills the cache, took up to 60 % longer.
  // It asks for memory in advance, which an update alone does not need: that took a quarter longer with what the
  // third-level cache holds, so where all elements are treated alike it is the compiler's loop.
  template <Mode kMode, class D, class Decay, class Decline, class Statistics>
  void turns(int64_t at, int64_t n, const D* d, Decay decay, Decline decline, Statistics statistics) const {
    static_assert(kInTurns<C> || __is_same(D, C), "gradients are widened where they lie by these loops alone");
    constexpr bool kUpdateAlone = __is_same(S, C) && kAlike<Decline> && __is_same(Statistics, NoStatistics);
    if constexpr (kInTurns<C> && __is_same(D, S)) {
      if (!kUpdateAlone || n < kUnrolled) return registers<kMode>(at, n, d, decay, decline, statistics);
    }
    if constexpr (__is_same(D, C)) {
      look(n, param + at, d, statistics);
      loop<kMode>(at, n, d, decay, decline);
    }
  }

  // Hands work(arrays, step) the arrays from `at` on and what is done to a vector of their elements.
  template <Mode kMode, class Work>
  SPARSEKERN_INLINE void with_step(int64_t at, Work work) const {
    using Vector = typename Vectors<C>::Vector;
    const C rate = lr, mu = momentum, share = fresh;
    if constexpr (kMode == kPlain) {
      S* const arrays[] = {param + at};
      work(arrays, [=](int64_t i, auto decay, auto decline, const Vector(&old)[1], Vector d, Vector(&updated)[1])
                       SPARSEKERN_ALWAYS {
                         if constexpr (kDecays<decltype(decay)>) d = d + old[0] * decay.vector(i);
                         updated[0] = decline.weight(i, old[0] - d * rate, old[0]);
                       });
    } else {
      S* const arrays[] = {param + at, buffer + at};
      work(arrays, [=](int64_t i, auto decay, auto decline, const Vector(&old)[2], Vector d, Vector(&updated)[2])
                       SPARSEKERN_ALWAYS {
                         if constexpr (kDecays<decltype(decay)>) d = d + old[0] * decay.vector(i);
                         Vector b = d;
                         if constexpr (kMode == kDampened || kMode == kNesterov) b = old[1] * mu + d * share;
                         if constexpr (kMode == kHeavyBall) b = old[1] * mu + d;
                         updated[1] = decline.state(i, b, old[1]);
                         d = kMode == kNesterov || kMode == kFirstNesterov ? d + b * mu : b;
                         updated[0] = decline.weight(i, old[0] - d * rate, old[0]);
                       });
    }
  }

  template <Mode kMode, class Decay, class Decline, class Statistics>
  void registers(int64_t at, int64_t n, const S* ds, Decay decay, Decline decline, Statistics statistics) const {
    with_step<kMode>(at, [=](const auto& arrays, auto step)
                             SPARSEKERN_ALWAYS { in_turns(n, arrays, ds, decay, decline, statistics, step); });
  }

  template <Mode kMode, class Decay, class Decline>
  void loop(int64_t at, int64_t n, const C* __restrict ds, Decay decay, Decline decline) const {
    S* __restrict ws = param + at;
    S* __restrict bs = kMode == kPlain ? nullptr : buffer + at;
    const C rate = lr, mu = momentum, share = fresh;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const C w = widen(ws[i]);
      C d = ds[i];
      if constexpr (kDecays<Decay>) d = d + w * decay[i];
      if constexpr (kMode != kPlain) {
        const C old = widen(bs[i]);
        C b = d;
        if constexpr (kMode == kDampened || kMode == kNesterov) b = old * mu + d * share;
        if constexpr (kMode == kHeavyBall) b = old * mu + d;
        narrow(decline.state(i, b, old), &bs[i]);
        d = kMode == kNesterov || kMode == kFirstNesterov ? d + b * mu : b;
      }
      narrow(decline.weight(i, w - d * rate, w), &ws[i]);
    }
  }

  S* param;
  S* buffer;
  C lr, momentum, fresh;
  Mode mode;
};
