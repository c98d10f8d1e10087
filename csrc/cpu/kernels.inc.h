// Every CPU loop, compiled once per ISA by kernels_<isa>.cpp, which names the namespace.
//
// Plain loops that the compiler vectorises. No STL and nothing else that leaves inline functions with external
// linkage: a copy made for one ISA must never be linked into another. Sums are taken in sixteen lanes that are
// written out in the source, so that the order of additions, and with it every bit of the result, is the same
// whatever the width of the machine's vectors.
#if defined(__AVX512F__)
// GCC 12 warns of the header's own "undefined" vectors.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "../abi.h"

#ifndef SPARSEKERN_ISA
#error "SPARSEKERN_ISA names the instruction set this file is compiled for"
#endif

namespace sparsekern {
namespace SPARSEKERN_ISA {
namespace {

#include "half.h"
// In this order: each builds on those before it.
#include "lanes.inc.h"
#include "registers.inc.h"
#include "values.inc.h"
#include "sums.inc.h"
#include "statistics.inc.h"
#include "factors.inc.h"
#include "turns.inc.h"
#include "sgd.inc.h"
#include "adam.inc.h"
#include "foreign.inc.h"
#include "walk.inc.h"
#include "finish.inc.h"
#include "activation.inc.h"
#include "norm.inc.h"
#include "norm_sums.inc.h"

template <template <class> class Update>
struct Entry {
  template <class S>
  static void run(const Job* job, const Chunk* chunk) {
    Walk<S, Update<S>>(*job, *chunk).run();
  }
};

// Of one dtype, by activation in the order of abi.h.
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
        {Entry<Look>::run<float>, Entry<Look>::run<double>, Entry<Look>::run<BFloat16>},
        {Entry<Mask>::run<float>, Entry<Mask>::run<double>, Entry<Mask>::run<BFloat16>},
    },
    finish,
    {norm_kernels<float>(), norm_kernels<double>(), norm_kernels<BFloat16>()},
};

}  // namespace SPARSEKERN_ISA
}  // namespace sparsekern
