#include "step.cuh"

namespace sparsekern::cuda {

cudaError_t step_float32(Kernel kernel, const ManyTensors& list, cudaStream_t stream) {
  return launch_step<float>(kernel, list, stream);
}

}  // namespace sparsekern::cuda
