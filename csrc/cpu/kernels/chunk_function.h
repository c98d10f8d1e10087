// The function that each file of an op defines: one chunk of a call, for one ISA and one dtype. The build names both
// and compiles the file once for each pair: SPARSEKERN_ISA as in isa.h, SPARSEKERN_DTYPE as below.
//
// Plain loops that the compiler vectorises. No STL and nothing else that leaves inline functions with external
// linkage. Sums are taken in sixteen lanes that are written out in the source, so that the order of additions, and with
// it every bit of the result, is the same whatever the width of the machine's vectors.
#pragma once

#include "../isa/bfloat16.h"
#include "../isa/chunk_kernel.h"

SPARSEKERN_BEGIN_ISA

using float32 = float;
using float64 = double;
using bfloat16 = BFloat16;
using Element = SPARSEKERN_DTYPE;

SPARSEKERN_END_ISA

#define SPARSEKERN_JOIN(a, b) a##_##b
#define SPARSEKERN_WITH_DTYPE(name, dtype) SPARSEKERN_JOIN(name, dtype)

// Defines for example adam_float32 for SPARSEKERN_CHUNK_FUNCTION(adam, Adam).
#define SPARSEKERN_CHUNK_FUNCTION(name, Update)                                            \
  namespace sparsekern {                                                                   \
  namespace SPARSEKERN_ISA {                                                               \
  void SPARSEKERN_WITH_DTYPE(name, SPARSEKERN_DTYPE)(const Job* job, const Chunk* chunk) { \
    ChunkKernel<Element, Update<Element>>(*job, *chunk).run();                             \
  }                                                                                        \
  }                                                                                        \
  }
