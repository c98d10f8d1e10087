#include "step.cuh"

namespace sparsekern::cuda {

cudaError_t step_float16(Kernel kernel, const Table& table, cudaStream_t stream) {
  return launch_step<Float16>(kernel, table, stream);
}

}  // namespace sparsekern::cuda
