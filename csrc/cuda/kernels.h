// Every launch there is, for the host code that makes them.
#pragma once

#include <cuda_runtime.h>

#include "table.cuh"

namespace sparsekern::cuda {

// The variants of the first launch. What else differs (nesterov, decoupled ...) is looked up in the table.
enum Kernel { kSgdPlain, kSgdMomentum, kAdamPlain, kAdamAmsgrad, kExternalStatistics, kClear };

cudaError_t step_float32(Kernel kernel, const Table& table, cudaStream_t stream);
cudaError_t step_float64(Kernel kernel, const Table& table, cudaStream_t stream);
cudaError_t step_bfloat16(Kernel kernel, const Table& table, cudaStream_t stream);
cudaError_t step_float16(Kernel kernel, const Table& table, cudaStream_t stream);

// The second launch: what is left to do for each tensor after its last chunk.
cudaError_t finish_step(const Table& table, cudaStream_t stream);

cudaError_t fold_moments(const Moments& moments, cudaStream_t stream);

// Whether the current device can run the kernels.
cudaError_t try_device();

}  // namespace sparsekern::cuda
