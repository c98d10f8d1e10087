#include "step.cuh"

namespace sparsekern::cuda {

cudaError_t step_float16(Kernel kernel, const ManyTensors& list, cudaStream_t stream) {
  return launch_step<Float16>(kernel, list, stream);
}

}  // namespace sparsekern::cuda
