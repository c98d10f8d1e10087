#include "step.cuh"

namespace sparsekern::cuda {

cudaError_t step_bfloat16(Kernel kernel, const ManyTensors& list, cudaStream_t stream) {
  return launch_step<BFloat16>(kernel, list, stream);
}

}  // namespace sparsekern::cuda
