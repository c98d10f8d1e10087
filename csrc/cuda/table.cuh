// The arguments of a launch: everything about hundreds of tensors, by value. So a launch needs no memory of its own,
// and a captured graph keeps what it was captured with.
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
  int32_t first_chunk : 31;
  uint32_t aligned : 1;  // all addresses to 16 bytes
};

// What fits beside the rest into the 32764 bytes that a kernel's arguments may have.
constexpr int kTableTensors = 290;

struct Table {
  Hyper hyper;
  RowArrays rows;
  float* partials;
  Scalar lr, grad_scale, found_inf;
  int32_t tensors, chunks;
  int32_t scaled, skippable;  // there is a gradient scale; there is a found_inf
  int32_t statistics;         // the op takes them where a tensor is tracked
  int32_t fades;              // the op applies and advances countdowns
  int32_t counts;             // the op counts steps
  int32_t tracks;             // some tensor of the list is tracked
  Entry entries[kTableTensors];
};

static_assert(sizeof(Table) <= 32764, "the arguments of a kernel");

}  // namespace sparsekern::cuda
