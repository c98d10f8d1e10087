// The namespace of one instruction set. Every header of this folder opens and closes it with these macros, so that each
// file of kernels/ has its own copy of every function: the linker must never replace a copy made for one ISA with that
// of another.
#pragma once

// <immintrin.h> takes longer to compile than some of the kernels.
#if defined(__x86_64__) && !defined(__AVX__)
#include <emmintrin.h>
#elif defined(__x86_64__)
// GCC 12 warns about uninitialised vectors of its own header.
#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
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
