#include "step.cuh"

namespace sparsekern::cuda {

cudaError_t step_float64(Kernel kernel, const Table& table, cudaStream_t stream) {
  return launch_step<double>(kernel, table, stream);
}

}  // namespace sparsekern::cuda
