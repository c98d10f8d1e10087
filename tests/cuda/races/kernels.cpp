// Kernels of a few types, so that a change of a header is compiled in seconds.
#include "norm_tile.cuh"
#include "step.cuh"

namespace sparsekern::cuda {

cudaError_t step_float32(Kernel kernel, const ManyTensors& list, cudaStream_t stream) {
  switch (kernel) {
    case kSgdMomentum: return launch_step<float, Sgd<float, true>>(list, stream);
    case kExternalStatistics: return launch_step<float, ExternalStatistics<float>>(list, stream);
    default: return launch_step<float, Adam<float, false>>(list, stream);
  }
}

template <class S>
cudaError_t norm_with_relu(NormPass pass, const NormCall& call, cudaStream_t stream) {
  switch (pass) {
    case kMomentsPass: return launch_norm<S, MomentsPass<S>>(call, stream);
    case kNormalisePass: return launch_norm<S, NormalisePass<S, kRelu>>(call, stream);
    case kGradSumsPass: return launch_norm<S, GradSumsPass<S, kRelu>>(call, stream);
    default: return launch_norm<S, BackwardPass<S, kRelu>>(call, stream);
  }
}

cudaError_t norm_float32(NormPass pass, const NormCall& call, cudaStream_t stream) {
  return norm_with_relu<float>(pass, call, stream);
}

cudaError_t norm_bfloat16(NormPass pass, const NormCall& call, cudaStream_t stream) {
  return norm_with_relu<BFloat16>(pass, call, stream);
}

// The drive does not ask for these.
cudaError_t step_float64(Kernel, const ManyTensors&, cudaStream_t) { return cudaErrorInvalidConfiguration; }
cudaError_t step_bfloat16(Kernel, const ManyTensors&, cudaStream_t) { return cudaErrorInvalidConfiguration; }
cudaError_t step_float16(Kernel, const ManyTensors&, cudaStream_t) { return cudaErrorInvalidConfiguration; }
cudaError_t norm_float64(NormPass, const NormCall&, cudaStream_t) { return cudaErrorInvalidConfiguration; }
cudaError_t norm_float16(NormPass, const NormCall&, cudaStream_t) { return cudaErrorInvalidConfiguration; }

}  // namespace sparsekern::cuda
