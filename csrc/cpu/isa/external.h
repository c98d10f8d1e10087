// The two passes around the step of an external optimizer: statistics before it, penalty, fade and mask after it.
#pragma once

#include "../../update.h"
#include "row_factors.h"
#include "vector_update.h"

SPARSEKERN_BEGIN_ISA

// Before the step: statistics.
template <class S>
struct ExternalStatistics {
  using C = typename Compute<S>::Type;
  static constexpr bool kReadsGrad = true, kTakesRowRuns = false;

  ExternalStatistics(const Job& job, int32_t tensor) : param(static_cast<const S*>(job.addresses[kParam][tensor])) {}

  template <class D, class Decay, class Fade, class Statistics>
  void update(int64_t at, int64_t n, const D* d, Decay, Fade, Statistics statistics) const {
    accumulate_statistics(n, param + at, d, statistics);
  }
  void masked(int64_t, int64_t) const {}
  void end(int64_t, int64_t) const {}
  void prefetch(int64_t at) const { prefetch_far(param + at); }
  bool reads_stored_gradients() const { return true; }
  bool fuses_statistics() const { return true; }
  bool expands_row_values() const { return false; }

 private:
  const S* param;
};

// After the step: penalty, fade and mask. Masked rows are set to 0, because the optimizer may have changed them.
template <class S>
struct ExternalMask {
  using C = typename Compute<S>::Type;
  static constexpr bool kReadsGrad = false, kTakesRowRuns = false;

  ExternalMask(const Job& job, int32_t tensor) : param(static_cast<S*>(job.addresses[kParam][tensor])) {}

  template <class Statistics>
  void update(int64_t at, int64_t n, const C*, Same<C> decay, NoFade fade, Statistics) const {
    // Most rows have no penalty and no fade; their memory is not touched.
    if (decay.value != 1) loop(param + at, n, decay, fade);
  }

  template <class Values, class Statistics>
  void update(int64_t at, int64_t n, const C*, Values decay, RowFades<C, Values> fade, Statistics) const {
    loop(param + at, n, decay, fade);
    S* __restrict ws = param + at;
    for (int64_t i = 0; i < n; ++i) ws[i] = fade.masked(i) ? S{} : ws[i];
  }

  void masked(int64_t at, int64_t n) const { __builtin_memset(param + at, 0, n * sizeof(S)); }
  void end(int64_t at, int64_t n) const { masked(at, n); }
  void prefetch(int64_t at) const { prefetch_far(param + at); }
  bool reads_stored_gradients() const { return true; }
  bool fuses_statistics() const { return true; }
  bool expands_row_values() const { return false; }

 private:
  template <class Decay, class Fade>
  static void loop(S* ws, int64_t n, Decay decay, Fade fade) {
    using Vector = typename Vectors<C>::Vector;
    // The weights stand in for a gradient, which is not used.
    vector_update<false>(n, {ws}, ws,
                         [=](auto place, const Vector(&old)[1], Vector, Vector(&updated)[1]) SPARSEKERN_ALWAYS {
                           updated[0] = fade.weight(place, old[0] * decay.vector(place), old[0]);
                         });
  }

  S* param;
};

SPARSEKERN_END_ISA
