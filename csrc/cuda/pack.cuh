// Loads and stores of a pack: sixteen bytes of a tensor, or one element.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

namespace sparsekern::cuda {

template <class S>
constexpr int kPack = 16 / sizeof(S);

template <class S, int kCount>
struct alignas(kCount * sizeof(S)) Pack {
  S values[kCount];
};

template <int kCount, class S>
__device__ __forceinline__ Pack<S, kCount> load(const S* address) {
  using Type = Pack<S, kCount>;
  return *static_cast<const Type*>(__builtin_assume_aligned(address, sizeof(Type)));
}

// An intrinsic with the default caching stores a pack: the compiler splits the copy of a struct into elements, and for
// sm_80 and sm_90 it does not merge their stores again.
template <int kCount, class S>
__device__ __forceinline__ void store(const Pack<S, kCount>& pack, S* address) {
  if constexpr (kCount == kPack<S>) {
    uint4 bits;
    memcpy(&bits, &pack, sizeof(bits));
    __stwb(reinterpret_cast<uint4*>(address), bits);
  } else {
    *address = pack.values[0];
  }
}

// The assignment of elements to threads need not depend on an address: without alignment the elements of a pack are
// loaded and stored one by one.
template <int kCount, class S>
__device__ __forceinline__ Pack<S, kCount> load(const S* address, [[maybe_unused]] bool aligned) {
  if constexpr (kCount == 1) {
    return load<kCount>(address);
  } else {
    if (aligned) return load<kCount>(address);
    Pack<S, kCount> pack;
#pragma unroll
    for (int k = 0; k < kCount; ++k) pack.values[k] = address[k];
    return pack;
  }
}

template <int kCount, class S>
__device__ __forceinline__ void store(const Pack<S, kCount>& pack, S* address, [[maybe_unused]] bool aligned) {
  if constexpr (kCount == 1) {
    store(pack, address);
  } else if (aligned) {
    store(pack, address);
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) address[k] = pack.values[k];
  }
}

}  // namespace sparsekern::cuda
