// What a tile stores for each of its channels, in float64, and how tiles are merged, in an order that depends on shapes
// alone.
#pragma once

#include "norm.h"
#include "numbers.cuh"
#include "table.cuh"

namespace sparsekern::cuda {

// The sums of dz, dz * (x - mean) and dz * dz, and the number of |dz| above the threshold.
struct GradSums {
  double values[kParts];

  __device__ void merge(const GradSums& other) {
    for (int i = 0; i < kParts; ++i) values[i] += other.values[i];
  }
};

// Number of elements, their mean, and the sum of their squared distances from it, merged as in Chan, Golub and LeVeque
// 1983, "Algorithms for computing the sample variance".
struct ChannelMoments {
  double values[kParts];

  __device__ double count() const { return values[0]; }
  __device__ double mean() const { return values[1]; }
  __device__ double distances() const { return values[2]; }

  __device__ void merge(const ChannelMoments& other) {
    if (other.count() == 0) return;
    const double both = count() + other.count(), share = other.count() / both, difference = other.mean() - mean();
    values[2] += other.distances() + difference * difference * (count() * share);
    values[1] += difference * share;
    values[0] = both;
  }
};

// Merges neighbouring `lanes` (of a warp at most); the first of them has the result. Called by whole warps.
template <class Part>
__device__ inline void merge_lanes(Part& part, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    Part other;
    for (int i = 0; i < kParts; ++i) other.values[i] = __shfl_xor_sync(0xffffffffu, part.values[i], distance);
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
