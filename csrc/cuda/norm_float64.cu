#include "norm_tile.cuh"

namespace sparsekern::cuda {

cudaError_t norm_float64(NormPass pass, const NormCall& call, cudaStream_t stream) {
  return launch_norm_pass<double>(pass, call, stream);
}

}  // namespace sparsekern::cuda
