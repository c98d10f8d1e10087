#include "step.cuh"

namespace sparsekern::cuda {

cudaError_t step_float64(Kernel kernel, const ManyTensors& list, cudaStream_t stream) {
  return launch_step<double>(kernel, list, stream);
}

}  // namespace sparsekern::cuda
