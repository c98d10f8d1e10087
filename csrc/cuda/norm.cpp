// The sequence of launches of a normalisation, forward and backward.
#include "norm.h"

#include <initializer_list>

namespace sparsekern::cuda {
namespace {

// Approximate number of tiles of a large tensor. Passes that take sums have few, because each leaves sums to merge: about
// two waves of two blocks on each of 132 multiprocessors. Other passes have many, so that the device is not idle while
// the last ones end.
constexpr int64_t kTilesToMerge = 512, kTiles = 8 * 1024;

int64_t element_size(int32_t dtype) {
  return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
}

bool none_is_null(std::initializer_list<const void*> addresses) {
  for (const void* address : addresses)
    if (address == nullptr) return false;
  return true;
}

bool forward_is_complete(const Norm& norm) {
  if (norm.momentum != 0 && !none_is_null({norm.running_mean, norm.running_var})) return false;
  if (norm.training) return none_is_null({norm.x, norm.out, norm.mean, norm.var, norm.scratch});
  return none_is_null({norm.x, norm.out, norm.mean, norm.var, norm.running_mean, norm.running_var});
}

bool backward_is_complete(const Norm& norm) {
  if (norm.residual != nullptr && norm.grad_residual == nullptr) return false;
  if (norm.threshold != nullptr && !none_is_null({norm.activity, norm.updates})) return false;
  return none_is_null(
      {norm.x, norm.grad, norm.out, norm.mean, norm.var, norm.grad_weight, norm.grad_bias, norm.scratch});
}

// The launches of one op. After an error nothing more is launched.
class Sequence {
 public:
  Sequence(const Norm& norm, std::atomic<int64_t>& launches)
      : norm_(norm), launches_(launches), stream_(static_cast<cudaStream_t>(norm.stream)) {
    uintptr_t bits = 0;
    for (const void* address : {norm.x, norm.residual, norm.grad, static_cast<const void*>(norm.out),
                                static_cast<const void*>(norm.grad_residual)})
      bits |= reinterpret_cast<uintptr_t>(address);
    aligned_ = bits % 16 == 0;
  }

  void pass(NormPass pass) {
    const auto run = norm_.dtype == kFloat32    ? norm_float32
                     : norm_.dtype == kFloat64  ? norm_float64
                     : norm_.dtype == kBFloat16 ? norm_bfloat16
                                                : norm_float16;
    launch([=](const NormCall& call, cudaStream_t stream) { return run(pass, call, stream); },
           pass == kMomentsPass || pass == kGradSumsPass ? kTilesToMerge : kTiles);
  }

  void merge(cudaError_t (*run)(const NormCall&, cudaStream_t)) { launch(run, kTilesToMerge); }

  int error = 0;

 private:
  template <class Run>
  void launch(Run run, int64_t tiles) {
    if (error != 0) return;
    ++launches_;
    const NormCut cut = norm_cut(norm_.outer, norm_.channels, norm_.inner, element_size(norm_.dtype), tiles);
    error = run(NormCall{norm_, cut, aligned_}, stream_);
  }

  const Norm& norm_;
  std::atomic<int64_t>& launches_;
  cudaStream_t stream_;
  bool aligned_;
};

}  // namespace

int run_norm_forward(const Norm& norm, std::atomic<int64_t>& launches) {
  if (!forward_is_complete(norm)) return -kNullPointer;
  Sequence sequence(norm, launches);
  if (norm.training) {
    sequence.pass(kMomentsPass);
    sequence.merge(fold_norm_moments);
  }
  sequence.pass(kNormalisePass);
  return sequence.error;
}

int run_norm_backward(const Norm& norm, std::atomic<int64_t>& launches) {
  if (!backward_is_complete(norm)) return -kNullPointer;
  Sequence sequence(norm, launches);
  sequence.pass(kGradSumsPass);
  sequence.merge(fold_norm_sums);
  sequence.pass(kBackwardPass);
  if (norm.threshold != nullptr) sequence.merge(count_norm);
  return sequence.error;
}

int64_t norm_merges(int64_t outer, int64_t channels, int64_t inner, int64_t element_size) {
  return serial_merges(norm_cut(outer, channels, inner, element_size, kTilesToMerge));
}

int64_t norm_scratch(int64_t outer, int64_t channels, int64_t inner, int64_t element_size) {
  const NormCut cut = norm_cut(outer, channels, inner, element_size, kTilesToMerge);
  return (1 + cut.pieces) * channels * kParts;
}

}  // namespace sparsekern::cuda
