#include "norm_tile.cuh"

namespace sparsekern::cuda {

cudaError_t norm_bfloat16(NormPass pass, const NormCall& call, cudaStream_t stream) {
  return launch_norm_pass<BFloat16>(pass, call, stream);
}

}  // namespace sparsekern::cuda
