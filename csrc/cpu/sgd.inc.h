// SGD, in torch's order of operations.

// Shortest row that is gone over twice, for its statistics and for its update.
constexpr int64_t kTwiceRow = 128;

template <class S>
struct Sgd {
  using C = typename Compute<S>::Type;
  static constexpr bool kReadsGrad = true;
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
  template <class D, class... Rest>
  void choose(int64_t at, int64_t n, const D* d, Rest... rest) const {
    switch (mode) {
      case kPlain: return turns<kPlain>(at, n, d, rest...);
      case kFirst: return turns<kFirst>(at, n, d, rest...);
      case kFirstNesterov: return turns<kFirstNesterov>(at, n, d, rest...);
      case kDampened: return turns<kDampened>(at, n, d, rest...);
      case kHeavyBall: return turns<kHeavyBall>(at, n, d, rest...);
      case kNesterov: return turns<kNesterov>(at, n, d, rest...);
    }
  }

  // One loop for statistics and update where elements have factors of their own, which are then read once, where they
  // have to be widened, and in short rows, whose ends it makes shorter. Else two loops, that the compiler unrolls: SGD
  // waits for memory, and one loop took 5 to 10 % longer.
  template <Mode kMode, class D, class Decay, class Decline, class Statistics>
  void turns(int64_t at, int64_t n, const D* d, Decay decay, Decline decline, Statistics statistics) const {
    static_assert(kInTurns<C> || __is_same(D, C), "gradients are widened where they lie by these loops alone");
    constexpr bool kOnce = !(__is_same(S, C) && kAlike<Decline>);
    if constexpr (kInTurns<C> && __is_same(D, S)) {
      if (kOnce || n < kTwiceRow) return registers<kMode>(at, n, d, decay, decline, statistics);
    }
    if constexpr (__is_same(D, C)) {
      look(n, param + at, d, statistics);
      loop<kMode>(at, n, d, decay, decline);
    }
  }

  template <Mode kMode, class Decay, class Decline, class Statistics>
  void registers(int64_t at, int64_t n, const S* ds, Decay decay, Decline decline, Statistics statistics) const {
    using Vector = typename Vectors<C>::Vector;
    const C rate = lr, mu = momentum, share = fresh;
    if constexpr (kMode == kPlain) {
      S* const arrays[] = {param + at};
      in_turns(n, arrays, ds, statistics,
               [=](int64_t i, const Vector(&old)[1], Vector d, Vector(&updated)[1]) SPARSEKERN_ALWAYS {
                 if constexpr (kDecays<Decay>) d = d + old[0] * decay.vector(i);
                 updated[0] = decline.weight(i, old[0] - d * rate, old[0]);
               });
    } else {
      S* const arrays[] = {param + at, buffer + at};
      in_turns(n, arrays, ds, statistics,
               [=](int64_t i, const Vector(&old)[2], Vector d, Vector(&updated)[2]) SPARSEKERN_ALWAYS {
                 if constexpr (kDecays<Decay>) d = d + old[0] * decay.vector(i);
                 Vector b = d;
                 if constexpr (kMode == kDampened || kMode == kNesterov) b = old[1] * mu + d * share;
                 if constexpr (kMode == kHeavyBall) b = old[1] * mu + d;
                 updated[1] = decline.state(i, b, old[1]);
                 d = kMode == kNesterov || kMode == kFirstNesterov ? d + b * mu : b;
                 updated[0] = decline.weight(i, old[0] - d * rate, old[0]);
               });
    }
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
