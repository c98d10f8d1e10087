#include "step.cuh"

namespace sparsekern::cuda {

cudaError_t step_bfloat16(Kernel kernel, const Table& table, cudaStream_t stream) {
  return launch_step<BFloat16>(kernel, table, stream);
}

}  // namespace sparsekern::cuda
