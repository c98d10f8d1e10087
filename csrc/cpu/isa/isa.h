// The namespace of one instruction set. Every header of this folder opens and closes it by these macros, so that each
// file of kernels/ has its own copy of everything: a copy made for one ISA must never be linked into another.
#pragma once

#if defined(__AVX512F__)
// GCC 12 warns of the header's own "undefined" vectors.
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
