// The namespace of one instruction set. Every header of this folder opens and closes it with these macros, so that each
// file of kernels/ has its own copy of every function: the linker must never replace a copy made for one ISA with that
// of another.
#pragma once

#if defined(__AVX512F__)
// GCC 12 warns about uninitialised vectors of its own header.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include <stdint.h>

#ifndef SPARSEKERN_ISA
#error "SPARSEKERN_ISA names the instruction set this file is compiled for"
#endif

#define SPARSEKERN_BEGIN_ISA \
  namespace sparsekern {     \
  namespace SPARSEKERN_ISA { \
  namespace {
#define SPARSEKERN_END_ISA \
  }                        \
  }                        \
  }

SPARSEKERN_BEGIN_ISA

inline int64_t minimum(int64_t a, int64_t b) {
  return a < b ? a : b;
}

SPARSEKERN_END_ISA
