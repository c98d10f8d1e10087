// What a tile stores for each of its channels, in float64, and how tiles are merged, in an order that depends on shapes
// alone.
#pragma once

#include "norm.h"
#include "numbers.cuh"
#include "table.cuh"

namespace sparsekern::cuda {

// Sums that are merged by addition.
template <int kValues>
struct Added {
  static_assert(kValues <= kParts, "scratch memory has kParts numbers for each tile and channel");
  static constexpr int kSize = kValues;
  double values[kValues];

  __device__ void merge(const Added& other) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] += other.values[i];
  }
};

// The sums of dz, dz * (x - mean) and dz * dz, and the number of |dz| above the threshold.
using GradSums = Added<4>;

// The sums of x - pivot and of its square, with one pivot for all elements of a channel in a tile.
using PivotSums = Added<2>;

// What a tile stores of the moments of a channel: number of elements, their mean, and the sum of their squared distances
// from it.
enum { kTileCount, kTileMean, kTileDistances };

// Merges neighbouring `lanes` (of a warp at most); all of them have the result. Called by whole warps.
template <class Part>
__device__ inline void merge_lanes(Part& part, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    Part other;
#pragma unroll
    for (int i = 0; i < Part::kSize; ++i) other.values[i] = __shfl_xor_sync(0xffffffffu, part.values[i], distance);
    part.merge(other);
  }
}

// The scratch memory holds the merged sums of every channel, then the parts of every channel's pieces.
__device__ inline double* folded_sums_of(const NormCall& call, int64_t channel) {
  return call.norm.scratch + channel * kParts;
}
__device__ inline double* part_of(const NormCall& call, int64_t channel, int64_t piece) {
  return call.norm.scratch + (call.norm.channels + channel * call.cut.pieces + piece) * kParts;
}

// The position of a thread in its tile.
struct Place {
  int64_t channel_begin, outer_begin, outer_end, inner_begin, inner_end, piece;
  int32_t lane, slot, way, ways;
};

// The number of a channel in a vector, or `missing` if the vector is null.
template <class C>
__device__ inline double number_of(const void* vector, int64_t channel, double missing) {
  return vector == nullptr ? missing : static_cast<double>(static_cast<const C*>(vector)[channel]);
}

__device__ inline bool is_masked(const Norm& norm, int64_t channel) {
  return norm.mask != nullptr && norm.mask[channel] != 0;
}

__device__ inline double elements_of(const Norm& norm) {
  return static_cast<double>(norm.outer * norm.inner);
}

}  // namespace sparsekern::cuda
