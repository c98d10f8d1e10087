// The loop that makes the update, over vectors in the compute type, for every ISA and dtype. Where fused_update.h has
// no loop for it, statistics are taken before, block by block.
#pragma once

#include "statistics.h"
#include "vector_math.h"

SPARSEKERN_BEGIN_ISA

typedef uint64_t SixteenBytes __attribute__((vector_size(16)));

// Copies the first n of sixteen elements; the others become 0.
template <class S>
SPARSEKERN_INLINE void copy_first(int64_t n, const S* from, S (&to)[kLanes]) {
  const SixteenBytes zeros = {};
#pragma GCC unroll 8
  for (uint64_t b = 0; b < sizeof(to); b += sizeof(zeros))
    __builtin_memcpy(reinterpret_cast<char*>(to) + b, &zeros, sizeof(zeros));
  __builtin_memcpy(to, from, n * sizeof(S));
}

// Elements to update between two prefetches of an array: those of a cache line, or the least that a loop updates.
template <class S>
constexpr int64_t kLine = sizeof(S) < 4 ? 64 / sizeof(S) : kLanes;

// Computes the updates of vector `part` of sixteen elements, the first of which is element i of the call.
template <int part, class S, class D, int kArrays, class Step>
SPARSEKERN_INLINE void update_vector(int64_t i, S* const (&arrays)[kArrays], const D* ds, Step step,
                                     typename Vectors<typename Compute<S>::Type>::Vector (&updated)[kArrays]) {
  using Order = Sixteen<S>;
  typename Vectors<typename Compute<S>::Type>::Vector old[kArrays];
#pragma GCC unroll 4
  for (int a = 0; a < kArrays; ++a) old[a] = Order::template load<part>(arrays[a]);
  step(Order::template place<part>(i), old, Order::template load<part>(ds), updated);
}

// Updates vector `part` and the following ones of sixteen neighbouring elements.
template <int part, class S, class D, int kArrays, class Step>
SPARSEKERN_INLINE void update_in_order(int64_t i, S* const (&arrays)[kArrays], const D* ds, Step step) {
  using V = Vectors<typename Compute<S>::Type>;
  if constexpr (part < kLaneVectors<typename Compute<S>::Type>) {
    typename V::Vector updated[kArrays];
    update_vector<part>(i, arrays, ds, step, updated);
#pragma GCC unroll 4
    for (int a = 0; a < kArrays; ++a) V::store(updated[a], arrays[a] + part * V::kWidth);
    update_in_order<part + 1>(i, arrays, ds, step);
  }
}

// Updates vector 0 of sixteen neighbouring elements.
template <class S, class D, int kArrays, class Step>
SPARSEKERN_INLINE void update_first_vector(int64_t i, S* const (&arrays)[kArrays], const D* ds, Step step) {
  using V = Vectors<typename Compute<S>::Type>;
  typename V::Vector updated[kArrays];
  update_vector<0>(i, arrays, ds, step, updated);
#pragma GCC unroll 4
  for (int a = 0; a < kArrays; ++a) V::store(updated[a], arrays[a]);
}

// Updates sixteen elements, the first of which is element i of the call.
template <class S, class D, int kArrays, class Step>
SPARSEKERN_INLINE void update_sixteen(int64_t i, S* const (&arrays)[kArrays], const D* ds, Step step) {
  if constexpr (kEveryOther<S>) {
    using Order = Sixteen<S>;
    typename Order::Vector even[kArrays], odd[kArrays];
    update_vector<0>(i, arrays, ds, step, even);
    update_vector<1>(i, arrays, ds, step, odd);
    // A NaN in any state makes the weight a NaN.
    if (__builtin_expect(Order::any_nan(even[0], odd[0]), 0)) {
#pragma GCC unroll 4
      for (int a = 0; a < kArrays; ++a) {
        even[a] = Order::one_nan(even[a]);
        odd[a] = Order::one_nan(odd[a]);
      }
    }
#pragma GCC unroll 4
    for (int a = 0; a < kArrays; ++a) Order::store(even[a], odd[a], arrays[a]);
  } else {
    update_in_order<0>(i, arrays, ds, step);
  }
}

// Updates the last n < 16 elements, the first of which is element i of the call, in copies padded with zeros.
template <class S, class D, int kArrays, class Step>
SPARSEKERN_INLINE void update_last(int64_t n, int64_t i, S* const (&arrays)[kArrays], const D* ds, Step step) {
  S copies[kArrays][kLanes];
  D copy[kLanes];
  S* at[kArrays];
  copy_first(n, ds + i, copy);
#pragma GCC unroll 4
  for (int a = 0; a < kArrays; ++a) {
    at[a] = copies[a];
    copy_first(n, arrays[a] + i, copies[a]);
  }
  update_sixteen(i, at, copy, step);
#pragma GCC unroll 4
  for (int a = 0; a < kArrays; ++a) __builtin_memcpy(arrays[a] + i, copies[a], n * sizeof(S));
}

// Updates n elements of kArrays arrays, of which the first holds the weights. `step(place, old, d, updated)` gets
// the vectors of the arrays and of the gradient at a place (values.h).
//
// kAhead: statistics of the next block follow, so its weights and gradients are prefetched. On AMD's Zen 4 prefetching
// into the first-level cache is a quarter slower.
template <bool kAhead, class S, class D, int kArrays, class Step>
SPARSEKERN_INLINE void vector_update(int64_t n, S* const (&arrays)[kArrays], const D* ds, Step step) {
  const auto update = [&](int64_t i) SPARSEKERN_ALWAYS {
    S* at[kArrays];
#pragma GCC unroll 4
    for (int a = 0; a < kArrays; ++a) at[a] = arrays[a] + i;
    update_sixteen(i, at, ds + i, step);
  };
  int64_t i = 0;
  if constexpr (kAhead) {
    for (; i + kLine<S> <= n; i += kLine<S>) {
      prefetch_far(arrays[0] + i + kBlock);
      prefetch_far(ds + i + kBlock);
#pragma GCC unroll 2
      for (int64_t in_line = 0; in_line < kLine<S>; in_line += kLanes) update(i + in_line);
    }
  }
  if constexpr (!kAhead || kLine<S> > kLanes)
    for (; i + kLanes <= n; i += kLanes) update(i);
  if (i < n) update_last(n - i, i, arrays, ds, step);
}

SPARSEKERN_END_ISA
