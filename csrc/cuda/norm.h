// The launches of a normalisation, for the host code.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "cut.h"

namespace sparsekern::cuda {

// Doubles that a tile stores for each of its channels, at most.
constexpr int kParts = 4;

// The arguments of a launch.
struct NormCall {
  Norm norm;
  NormCut cut;
  int32_t aligned;  // all tensors are aligned to 16 bytes
};

// Passes over the tensors.
enum NormPass { kMomentsPass, kNormalisePass, kGradSumsPass, kBackwardPass };

cudaError_t norm_float32(NormPass pass, const NormCall& call, cudaStream_t stream);
cudaError_t norm_float64(NormPass pass, const NormCall& call, cudaStream_t stream);
cudaError_t norm_bfloat16(NormPass pass, const NormCall& call, cudaStream_t stream);
cudaError_t norm_float16(NormPass pass, const NormCall& call, cudaStream_t stream);

// Merge what kMomentsPass and kGradSumsPass stored for the tiles of each channel; count_norm updates the gradient
// counts.
cudaError_t fold_norm_moments(const NormCall& call, cudaStream_t stream);
cudaError_t fold_norm_sums(const NormCall& call, cudaStream_t stream);
cudaError_t count_norm(const NormCall& call, cudaStream_t stream);

// One op. Returns 0, a CUDA error, or the negative of an Error if nothing was launched. Adds the number of its launches
// to `launches`.
int run_norm_forward(const Norm& norm, std::atomic<int64_t>& launches);
int run_norm_backward(const Norm& norm, std::atomic<int64_t>& launches);

// Merges one after the other in a tile of a pass that takes sums; see serial_merges.
int64_t norm_merges(int64_t outer, int64_t channels, int64_t inner, int64_t element_size);

// Size in doubles of the scratch memory that each of them needs.
int64_t norm_scratch(int64_t outer, int64_t channels, int64_t inner, int64_t element_size);

}  // namespace sparsekern::cuda
