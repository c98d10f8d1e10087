// Sixteen bytes of a tensor at a time, or the part of them that belongs to a row.
#pragma once

#include <stdint.h>

namespace sparsekern::cuda {

template <class S>
constexpr int kPack = 16 / sizeof(S);

template <class S>
struct alignas(16) Pack {
  S values[kPack<S>];
};

// Elements [begin + low, begin + high) of a tensor. `whole`: as many as a pack has, and aligned.
struct Span {
  int64_t begin;
  int32_t low, high;
  bool whole;

  __device__ bool holds(int k) const { return k >= low && k < high; }
};

template <class S>
__device__ __forceinline__ Pack<S> load(const S* tensor, const Span& span) {
  const S* address = tensor + span.begin;
  if (span.whole) return *static_cast<const Pack<S>*>(__builtin_assume_aligned(address, 16));
  Pack<S> pack = {};
#pragma unroll
  for (int k = 0; k < kPack<S>; ++k)
    if (span.holds(k)) pack.values[k] = address[k];
  return pack;
}

template <class S>
__device__ __forceinline__ void store(const Pack<S>& pack, S* tensor, const Span& span) {
  S* address = tensor + span.begin;
  if (span.whole) {
    *static_cast<Pack<S>*>(__builtin_assume_aligned(address, 16)) = pack;
    return;
  }
#pragma unroll
  for (int k = 0; k < kPack<S>; ++k)
    if (span.holds(k)) address[k] = pack.values[k];
}

}  // namespace sparsekern::cuda
