// The kernel table of one ISA: every CPU loop for every dtype. kernels_<isa>.cpp defines SPARSEKERN_ISA and includes
// this file.
//
// The headers use no STL and nothing else that creates inline functions with external linkage. Sums are taken in
// sixteen lanes that are written out in the source, so the order of additions, and every bit of the result, does not
// depend on the width of the machine's vectors.
#pragma once

#include "../../abi.h"
#include "activation.h"
#include "adam.h"
#include "chunk_kernel.h"
#include "external.h"
#include "finish_rows.h"
#include "norm.h"
#include "norm_sums.h"
#include "sgd.h"

namespace sparsekern {
namespace SPARSEKERN_ISA {
namespace {

template <template <class> class Update>
struct Entry {
  template <class S>
  static void run(const Job* job, const Chunk* chunk) {
    ChunkKernel<S, Update<S>>(*job, *chunk).run();
  }
};

// The kernels of one dtype, by activation in the order of abi.h.
#define SPARSEKERN_FOR_ACTIVATIONS(of) {of(Identity), of(Relu), of(Relu6), of(Hardswish), of(Silu)}
#define SPARSEKERN_FORWARD(Act) norm_pass<Forward, S, Act>
#define SPARSEKERN_SUMS(Act) norm_grad_sums<S, Act>
#define SPARSEKERN_BACKWARD(Act) norm_pass<Backward, S, Act>

template <class S>
constexpr NormKernels norm_kernels() {
  return {
      norm_moments<S>,
      SPARSEKERN_FOR_ACTIVATIONS(SPARSEKERN_FORWARD),
      SPARSEKERN_FOR_ACTIVATIONS(SPARSEKERN_SUMS),
      SPARSEKERN_FOR_ACTIVATIONS(SPARSEKERN_BACKWARD),
  };
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    {
        {Entry<Sgd>::run<float>, Entry<Sgd>::run<double>, Entry<Sgd>::run<BFloat16>},
        {Entry<Adam>::run<float>, Entry<Adam>::run<double>, Entry<Adam>::run<BFloat16>},
        {Entry<ExternalStatistics>::run<float>, Entry<ExternalStatistics>::run<double>,
         Entry<ExternalStatistics>::run<BFloat16>},
        {Entry<ExternalMask>::run<float>, Entry<ExternalMask>::run<double>, Entry<ExternalMask>::run<BFloat16>},
    },
    finish,
    {norm_kernels<float>(), norm_kernels<double>(), norm_kernels<BFloat16>()},
};

}  // namespace SPARSEKERN_ISA
}  // namespace sparsekern
