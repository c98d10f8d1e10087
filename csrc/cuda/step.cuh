// The first launch of a step, with one block for each chunk of a list of tensors.
#pragma once

#include "adam.cuh"
#include "columns.cuh"
#include "external.cuh"
#include "kernels.h"
#include "rows.cuh"
#include "sgd.cuh"

namespace sparsekern::cuda {

// The entry of the tensor that chunk `chunk` of a launch belongs to.
template <class Argument>
__device__ inline const Entry& entry_of(const Argument& list, int32_t chunk) {
  int32_t low = 0, high = list.table.tensors;
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (list.entries[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return list.entries[low];
}

// Chunk `index` of a tensor. The pieces of the same rows have consecutive indices.
__device__ inline Chunk chunk_of(const Entry& entry, int32_t index) {
  const int32_t piece = index % entry.pieces;
  const int32_t row = index / entry.pieces * entry.row_step;
  const int32_t inner_pieces = static_cast<int32_t>((entry.inner + entry.inner_step - 1) / entry.inner_step);
  const int64_t outer = piece / inner_pieces * entry.outer_step, inner = piece % inner_pieces * entry.inner_step;
  return {outer, minimum(entry.outer, outer + entry.outer_step), inner, minimum(entry.inner, inner + entry.inner_step),
          row,   minimum(entry.rows, row + entry.row_step),      piece};
}

// Minimum number of blocks that fit the registers of a multiprocessor. With three, some kernels would spill.
constexpr int kBlocks = 2;

template <class S, class Update, class Argument>
__global__ void __launch_bounds__(kThreads, kBlocks) step(const Argument __grid_constant__ list) {
  const Table& table = list.table;
  const Conditions conditions = conditions_of(table);
  if (!conditions.apply) return;
  const int32_t index = static_cast<int32_t>(blockIdx.x);
  const Entry& entry = entry_of(list, index);
  const Chunk chunk = chunk_of(entry, index - entry.first_chunk);
  const Worker<S, Update> work(table, entry, conditions);
  if (entry.lanes > 0) {
    update_rows(table, entry, chunk, conditions, work);
  } else {
    update_columns(table, entry, chunk, conditions, work);
  }
}

template <class S, class Update>
cudaError_t launch_step(const ManyTensors& list, cudaStream_t stream) {
  const int32_t blocks = list.table.chunks;
  return list.table.tensors <= kFewTensors
             ? launch(step<S, Update, FewTensors>, blocks, kThreads, few_of(list), stream)
             : launch(step<S, Update, ManyTensors>, blocks, kThreads, list, stream);
}

// The kernels of one dtype, in the order of Kernel.
template <class S>
cudaError_t launch_step(Kernel kernel, const ManyTensors& list, cudaStream_t stream) {
  switch (kernel) {
    case kSgdPlain: return launch_step<S, Sgd<S, false>>(list, stream);
    case kSgdMomentum: return launch_step<S, Sgd<S, true>>(list, stream);
    case kAdamPlain: return launch_step<S, Adam<S, false>>(list, stream);
    case kAdamAmsgrad: return launch_step<S, Adam<S, true>>(list, stream);
    case kExternalStatistics: return launch_step<S, ExternalStatistics<S>>(list, stream);
    default: return launch_step<S, ExternalMask<S>>(list, stream);
  }
}

}  // namespace sparsekern::cuda
