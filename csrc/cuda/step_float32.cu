#include "step.cuh"

namespace sparsekern::cuda {

cudaError_t step_float32(Kernel kernel, const Table& table, cudaStream_t stream) {
  return launch_step<float>(kernel, table, stream);
}

}  // namespace sparsekern::cuda
