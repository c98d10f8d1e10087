// What optimizers that know nothing of rows need around their own step.

// Statistics alone, before it.
template <class S>
struct Look {
  using C = typename Compute<S>::Type;
  static constexpr bool kReadsGrad = true, kTakesRows = false;

  Look(const Job& job, int32_t tensor) : param(static_cast<const S*>(job.addresses[kParam][tensor])) {}

  template <class D, class Decay, class Decline, class Statistics>
  void update(int64_t at, int64_t n, const D* d, Decay, Decline, Statistics statistics) const {
    look(n, param + at, d, statistics);
  }
  void masked(int64_t, int64_t) const {}
  void end(int64_t, int64_t) const {}
  void prefetch(int64_t at) const { prefetch_far(param + at); }
  bool fuses() const { return true; }
  bool spreads() const { return false; }

 private:
  const S* param;
};

// Penalty, decline and mask, after it: masked rows are set to 0, since that step may have moved them.
template <class S>
struct Mask {
  using C = typename Compute<S>::Type;
  static constexpr bool kReadsGrad = false, kTakesRows = false;

  Mask(const Job& job, int32_t tensor) : param(static_cast<S*>(job.addresses[kParam][tensor])) {}

  void update(int64_t at, int64_t n, const C*, Same<C> decay, SameDecline<C> decline, NoStatistics) const {
    // Most rows ask for nothing: leave their memory alone.
    if (decay.value == 1 && decline.value == 1) return;
    loop(param + at, n, decay, decline);
  }

  template <class Values>
  void update(int64_t at, int64_t n, const C*, Values decay, Declines<C, Values> decline, NoStatistics) const {
    loop(param + at, n, decay, decline);
    S* __restrict ws = param + at;
    for (int64_t i = 0; i < n; ++i) ws[i] = decline.values[i] < 0 ? S{} : ws[i];
  }

  template <class Decay, class Decline, class Statistics>
  void update(int64_t, int64_t, const C*, Decay, Decline, Statistics) const {}

  void masked(int64_t at, int64_t n) const { __builtin_memset(param + at, 0, n * sizeof(S)); }
  void end(int64_t at, int64_t n) const { masked(at, n); }
  void prefetch(int64_t at) const { prefetch_far(param + at); }
  bool fuses() const { return true; }
  bool spreads() const { return false; }

 private:
  template <class Decay, class Decline>
  static void loop(S* __restrict ws, int64_t n, Decay decay, Decline decline) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const C w = widen(ws[i]);
      narrow(decline.weight(i, w * decay[i], w), &ws[i]);
    }
  }

  S* param;
};
