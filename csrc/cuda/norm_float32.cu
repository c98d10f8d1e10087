#include "norm_tile.cuh"

namespace sparsekern::cuda {

cudaError_t norm_float32(NormPass pass, const NormCall& call, cudaStream_t stream) {
  return launch_norm_pass<float>(pass, call, stream);
}

}  // namespace sparsekern::cuda
