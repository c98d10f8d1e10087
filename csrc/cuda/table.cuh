// The arguments of a launch: a table of tensors, passed by value. A launch thus needs no device memory of its own, and
// a captured CUDA graph keeps its arguments.
#pragma once

#include "abi.h"

namespace sparsekern::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// Threads of the block that finishes a tensor.
constexpr int kFinishThreads = 512;

constexpr int kSums = 4;

struct Entry {
  void* address[kStep];  // param, grad and states
  float* step;
  int64_t outer, inner;
  int64_t outer_step, inner_step;
  int64_t partial;
  int32_t rows, start;
  int32_t row_step, pieces, lanes;
  uint32_t first_chunk : 30;
  // Whether addresses are aligned to 16 bytes: those of the parameter and its states, and that of the gradient. The
  // gradients of data-parallel trainings are views of a bucket, behind tensors of any size.
  uint32_t aligned : 1, grad_aligned : 1;
};

// What all tensors of a launch share.
struct Table {
  Hyper hyper;
  double log_beta1, log_beta2;  // natural logarithms, Adam only
  RowArrays rows;
  float* partials;
  Scalar lr, grad_scale, found_inf;
  int32_t tensors, chunks;
  int32_t scaled, skippable;  // grad_scale is present; found_inf is present
  int32_t statistics;         // the op takes statistics of tracked tensors
  int32_t fades;              // the op applies and advances countdowns
  int32_t counts;             // the op increments step counters
  int32_t tracks;             // some tensor of the list is tracked
  int32_t sums_aligned;       // the sums of all rows are aligned to 16 bytes
};

template <int kTensors>
struct Arguments {
  Table table;
  Entry entries[kTensors];
};

// As many tensors as fit into the 32764 bytes that the arguments of a kernel may have; and into 4 KB, for short lists:
// the host copies all arguments at every launch, whether they are used or not.
constexpr int kTableTensors = 289, kFewTensors = 32;

using ManyTensors = Arguments<kTableTensors>;
using FewTensors = Arguments<kFewTensors>;

static_assert(sizeof(ManyTensors) <= 32764 && sizeof(FewTensors) <= 4096, "the arguments of a kernel");

}  // namespace sparsekern::cuda
