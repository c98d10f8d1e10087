// The launch of a kernel with one argument.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sparsekern::cuda {

template <class Kernel, class Argument>
cudaError_t launch(Kernel kernel, int64_t blocks, int threads, const Argument& argument, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, argument);
}

}  // namespace sparsekern::cuda
