// The four sums of a row. Many threads take them; they are folded in an order that depends on shapes alone.
#pragma once

#include <cuda_runtime.h>

#include "pack.cuh"
#include "table.cuh"

namespace sparsekern::cuda {

// The sums of a row as they are stored.
using RowSums = Pack<float, kSums>;

template <class C>
struct Sums {
  C count, dot, grad_sq, weight_sq;

  __device__ void add(C w, C d, C threshold) {
    count += (d < C(0) ? -d : d) > threshold ? C(1) : C(0);
    dot += w * d;
    grad_sq += d * d;
    weight_sq += w * w;
  }

  __device__ void operator+=(const Sums& other) {
    count += other.count;
    dot += other.dot;
    grad_sq += other.grad_sq;
    weight_sq += other.weight_sq;
  }
};

// Adds up the sums of `lanes` neighbouring threads, at most a warp. The first of them has the result. Called by whole
// warps.
template <class C>
__device__ inline void fold_lanes(Sums<C>& sums, int lanes) {
  constexpr unsigned kAll = 0xffffffffu;
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    Sums<C> other;
    other.count = __shfl_xor_sync(kAll, sums.count, distance);
    other.dot = __shfl_xor_sync(kAll, sums.dot, distance);
    other.grad_sq = __shfl_xor_sync(kAll, sums.grad_sq, distance);
    other.weight_sq = __shfl_xor_sync(kAll, sums.weight_sq, distance);
    sums += other;
  }
}

// Adds up the sums of all threads of the block. The first one has the result. Called by whole blocks.
template <class C>
__device__ inline void fold_block(Sums<C>& sums) {
  __shared__ Sums<C> of_warps[kThreads / kWarp];
  fold_lanes(sums, kWarp);
  __syncthreads();  // earlier reads of `of_warps` are complete
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = sums;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kThreads / kWarp; ++warp) sums += of_warps[warp];
}

// Adds up all[i + j * stride] over j < count for each i. Each thread is one (i, j), and (i, 0) has the result. Called
// by whole blocks.
template <class C>
__device__ inline void fold_strided(Sums<C>* all, int at, int j, int count, int stride) {
  int reach = 1;
  while (reach < count) reach *= 2;
  for (reach /= 2; reach > 0; reach /= 2) {
    __syncthreads();
    if (j < reach && j + reach < count) all[at] += all[at + reach * stride];
  }
}

template <class C>
__device__ inline void store_sums(const Table& table, const Entry& entry, int32_t piece, int32_t row,
                                  const Sums<C>& sums) {
  float* out = entry.pieces == 1
                   ? table.rows.sums + (static_cast<int64_t>(entry.start) + row) * kSums
                   : table.partials + (entry.partial + static_cast<int64_t>(piece) * entry.rows + row) * kSums;
  const RowSums four = {{static_cast<float>(sums.count), static_cast<float>(sums.dot), static_cast<float>(sums.grad_sq),
                         static_cast<float>(sums.weight_sq)}};
  store(four, out, table.sums_aligned);
}

}  // namespace sparsekern::cuda
