// The launches of a step, for the host code.
#pragma once

#include <cuda_runtime.h>

#include "table.cuh"

namespace sparsekern::cuda {

// The variants of the first launch. The table holds all other options, such as nesterov and decoupled.
enum Kernel { kSgdPlain, kSgdMomentum, kAdamPlain, kAdamAmsgrad, kExternalStatistics, kExternalMask };

cudaError_t step_float32(Kernel kernel, const Table& table, cudaStream_t stream);
cudaError_t step_float64(Kernel kernel, const Table& table, cudaStream_t stream);
cudaError_t step_bfloat16(Kernel kernel, const Table& table, cudaStream_t stream);
cudaError_t step_float16(Kernel kernel, const Table& table, cudaStream_t stream);

// The second launch: the rows of each tensor after its last chunk (finish.cu).
cudaError_t finish_step(const Table& table, cudaStream_t stream);

cudaError_t fold_moments(const Moments& moments, cudaStream_t stream);

// Whether the current device can run the kernels.
cudaError_t try_device();

}  // namespace sparsekern::cuda
