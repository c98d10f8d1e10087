// What optimizers that know nothing of rows need around their own step.

// Statistics alone, before it.
template <class S>
struct Look {
  using C = typename Compute<S>::Type;
  static constexpr bool kReadsGrad = true;
  static constexpr bool kFuses = true;

  Look(const Job& job, int32_t tensor) : param(static_cast<const S*>(job.addresses[kParam][tensor])) {}

  void update(int64_t, int64_t, const C*, Same<C>, SameDecline<C>, NoStatistics) const {}
  void update(int64_t at, int64_t n, const C* d, Same<C>, SameDecline<C>, RowStatistics<C> row) const {
    add_row(*row.sums, param + at, d, n, row.readable, row.threshold);
  }
  void update(int64_t, int64_t, const C*, const C*, EachDecline<C>) const {}
  void masked(int64_t, int64_t) const {}
  void end(int64_t, int64_t) const {}
  void prefetch(int64_t) const {}

 private:
  const S* param;
};

// Penalty, decline and mask, after it: masked rows are set to 0, since that step may have moved them.
template <class S>
struct Mask {
  using C = typename Compute<S>::Type;
  static constexpr bool kReadsGrad = false;
  static constexpr bool kFuses = false;

  Mask(const Job& job, int32_t tensor) : param(static_cast<S*>(job.addresses[kParam][tensor])) {}

  template <class Statistics>
  void update(int64_t at, int64_t n, const C*, Same<C> decay, SameDecline<C> decline, Statistics) const {
    // Most rows ask for nothing: leave their memory alone.
    if (decay.value == 1 && decline.value == 1) return;
    loop(param + at, n, decay, decline);
  }

  void update(int64_t at, int64_t n, const C*, const C* decay, EachDecline<C> decline) const {
    loop(param + at, n, decay, decline);
    for (int64_t i = 0; i < n; ++i)
      if (decline.value[i] < 0) param[at + i] = S{};
  }

  void masked(int64_t at, int64_t n) const { __builtin_memset(param + at, 0, n * sizeof(S)); }
  void end(int64_t at, int64_t n) const { masked(at, n); }
  void prefetch(int64_t) const {}

 private:
  template <class Decay, class Decline>
  static void loop(S* __restrict ws, int64_t n, Decay decay, Decline decline) {
    for (int64_t i = 0; i < n; ++i) {
      const C w = widen(ws[i]);
      narrow(decline.weight(i, w * decay[i], w), &ws[i]);
    }
  }

  S* param;
};
