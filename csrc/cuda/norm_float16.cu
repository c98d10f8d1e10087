#include "norm_tile.cuh"

namespace sparsekern::cuda {

cudaError_t norm_float16(NormPass pass, const NormCall& call, cudaStream_t stream) {
  return launch_norm_pass<Float16>(pass, call, stream);
}

}  // namespace sparsekern::cuda
