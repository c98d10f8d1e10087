// The running means per channel, updated once per step. One thread for each channel adds up its gates.
#include "kernels.h"

namespace sparsekern::cuda {
namespace {

constexpr int kDot = 1;

// Whether this is the last block to call it. Called by whole blocks.
__device__ bool is_last_block(uint32_t* ticket) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  __syncthreads();
  return last;
}

__global__ void __launch_bounds__(kThreads) fold_channels(const Moments __grid_constant__ moments) {
  const bool update_statistics = *moments.pending != 0;
  const float keep = static_cast<float>(moments.decay), one_minus_decay = static_cast<float>(1 - moments.decay);
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (update_statistics && channel < moments.channels) {
    float x = 0;
    for (int64_t gate = moments.gate_offsets[channel]; gate < moments.gate_offsets[channel + 1]; ++gate)
      x += moments.sums[moments.gate_rows[gate] * kSums + kDot];
    moments.dot[channel] = moments.dot[channel] * keep + x * one_minus_decay;
    moments.dot_sq[channel] = moments.dot_sq[channel] * keep + x * x * one_minus_decay;
  }
  // A row may be the gate of several channels, so its dot is cleared after all channels have read it.
  if (!is_last_block(moments.ticket)) return;
  for (int64_t row = threadIdx.x; row < moments.rows; row += kThreads) moments.sums[row * kSums + kDot] = 0;
  if (threadIdx.x > 0) return;
  if (update_statistics) *moments.updates += 1;
  *moments.pending = 0;
  *moments.ticket = 0;
}

}  // namespace

cudaError_t fold_moments(const Moments& moments, cudaStream_t stream) {
  return launch(fold_channels, moments.channels / kThreads + 1, kThreads, moments, stream);
}

}  // namespace sparsekern::cuda
