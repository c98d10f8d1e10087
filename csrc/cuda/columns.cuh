// The loop of a block for rows that are not contiguous (outer > 1, as in transposed convolutions): a tile of
// neighbouring columns of the [rows, inner] plane over a range of outer indices. The threads form a grid of columns by
// outer indices, so neighbouring threads read neighbouring memory and every thread stays in one row.
#pragma once

#include "rows.cuh"

namespace sparsekern::cuda {

template <class S, class Update>
__device__ inline void update_columns(const Table& table, const Entry& entry, const Chunk& chunk,
                                      const Conditions& conditions, const Worker<S, Update>& work) {
  using C = typename Compute<S>::Type;
  // Packs of sixteen bytes if none of them reaches into the next row, else single elements.
  const bool whole = entry.aligned && entry.inner % kPack<S> == 0;
  const int32_t size = whole ? kPack<S> : 1;
  const int64_t inner = (chunk.inner_end - chunk.inner_begin) / size;
  const int64_t width = (chunk.row_end - chunk.row_begin) * inner;
  // A tile that is wider than the block is one row, and each thread takes several columns.
  const int32_t columns = width < kThreads ? static_cast<int32_t>(width) : kThreads;
  const int32_t column = static_cast<int32_t>(threadIdx.x) % columns;
  const int32_t depth = kThreads / columns, level = static_cast<int32_t>(threadIdx.x) / columns;
  const int32_t of_row = inner < columns ? static_cast<int32_t>(inner) : columns;
  const int32_t row = chunk.row_begin + column / of_row;

  Sums<C> sums = {};
  const Factors<C> factors = factors_of<C>(table, entry, row, conditions);
  if (level < depth && !work.skips(factors)) {
    const C threshold = work.statistics ? table.rows.threshold[entry.start + row] : C(0);
    for (int64_t outer = chunk.outer_begin + level; outer < chunk.outer_end; outer += depth) {
      const int64_t begin = (outer * entry.rows + row) * entry.inner + chunk.inner_begin;
      for (int64_t at = column % of_row; at < inner; at += of_row) {
        if (whole) {
          work.template run<kPack<S>>(begin + at * size, factors, threshold, sums);
        } else {
          work.template run<1>(begin + at, factors, threshold, sums);
        }
      }
    }
  }
  if (!work.statistics) return;
  __shared__ Sums<C> all[kThreads];
  all[threadIdx.x] = sums;
  fold_strided(all, threadIdx.x, level, depth, columns);
  const int32_t of = column % of_row;
  fold_strided(all, threadIdx.x, level == 0 ? of : of_row, of_row, 1);
  if (level == 0 && of == 0) store_sums(table, entry, chunk.piece, row, all[column]);
}

}  // namespace sparsekern::cuda
