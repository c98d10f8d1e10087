// The launches of a step, for the host code.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "launch.h"
#include "table.cuh"

namespace sparsekern::cuda {

// The variants of the first launch. The table holds all other options, such as nesterov and decoupled.
enum Kernel { kSgdPlain, kSgdMomentum, kAdamPlain, kAdamAmsgrad, kExternalStatistics, kExternalMask };

// The launches pass the first kFewTensors tensors alone where there are no more.
cudaError_t step_float32(Kernel kernel, const ManyTensors& list, cudaStream_t stream);
cudaError_t step_float64(Kernel kernel, const ManyTensors& list, cudaStream_t stream);
cudaError_t step_bfloat16(Kernel kernel, const ManyTensors& list, cudaStream_t stream);
cudaError_t step_float16(Kernel kernel, const ManyTensors& list, cudaStream_t stream);

// The second launch: the rows of each tensor after its last chunk (finish.cu).
cudaError_t finish_step(const ManyTensors& list, cudaStream_t stream);

// The arguments without the entries that a short list does not use.
inline FewTensors few_of(const ManyTensors& list) {
  FewTensors few = {list.table, {}};
  std::copy_n(list.entries, list.table.tensors, few.entries);
  return few;
}

cudaError_t fold_moments(const Moments& moments, cudaStream_t stream);

// Whether the current device can run the kernels.
cudaError_t try_device();

}  // namespace sparsekern::cuda
