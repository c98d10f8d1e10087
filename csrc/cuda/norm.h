// The launches of a normalisation, for the host code that makes them.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "cut.h"

namespace sparsekern::cuda {

// Doubles that a tile leaves for each of its channels.
constexpr int kParts = 4;

// The arguments of a launch.
struct NormCall {
  Norm norm;
  NormCut cut;
  int32_t aligned;  // the tensors, to 16 bytes
};

// Passes over the tensors.
enum NormPass { kTakeMoments, kNormalise, kSumUp, kDescend };

cudaError_t norm_float32(NormPass pass, const NormCall& call, cudaStream_t stream);
cudaError_t norm_float64(NormPass pass, const NormCall& call, cudaStream_t stream);
cudaError_t norm_bfloat16(NormPass pass, const NormCall& call, cudaStream_t stream);
cudaError_t norm_float16(NormPass pass, const NormCall& call, cudaStream_t stream);

// What kTakeMoments and kSumUp found in the tiles becomes one for each channel, and is stored; with counts these too.
cudaError_t fold_norm_moments(const NormCall& call, cudaStream_t stream);
cudaError_t fold_norm_sums(const NormCall& call, cudaStream_t stream);
cudaError_t count_norm(const NormCall& call, cudaStream_t stream);

// One op: 0, an error of CUDA that ended it, or the negative of an Error, when nothing was launched. Adds to
// `launches` what it launches.
int run_norm_forward(const Norm& norm, std::atomic<int64_t>& launches);
int run_norm_backward(const Norm& norm, std::atomic<int64_t>& launches);

// Doubles of scratch that either of them needs.
int64_t norm_scratch(int64_t outer, int64_t channels, int64_t inner, int64_t element_size);

}  // namespace sparsekern::cuda
