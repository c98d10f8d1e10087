// The function that each file of an op defines: one chunk of a call, for one ISA and one dtype. The build compiles the
// file once for each pair, which it names by SPARSEKERN_ISA (see isa.h) and SPARSEKERN_DTYPE (one of the aliases
// below).
//
// The headers use no STL and nothing else that creates inline functions with external linkage. Sums are taken in
// sixteen lanes that are written out in the source, so the order of additions, and every bit of the result, does not
// depend on the width of the machine's vectors.
#pragma once

#include "../isa/bfloat16.h"
#include "../isa/chunk_kernel.h"

#ifndef SPARSEKERN_DTYPE
#error "SPARSEKERN_DTYPE names the dtype this file is compiled for"
#endif

SPARSEKERN_BEGIN_ISA

using float32 = float;
using float64 = double;
using bfloat16 = BFloat16;
using float16 = Float16;
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
