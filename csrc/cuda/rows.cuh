// The loop of a block for contiguous rows. A power of two of threads works on each row: from 1 for rows of one element
// to the whole block.
#pragma once

#include "worker.cuh"

namespace sparsekern::cuda {

// A chunk of a tensor: the work of one block.
struct Chunk {
  int64_t outer_begin, outer_end;
  int64_t inner_begin, inner_end;
  int32_t row_begin, row_end;
  int32_t piece;
};

// Updates the elements [begin, end), which `lanes` threads share; this is thread `lane`. It works on packs at multiples
// of the pack size, and on single elements at both ends. Without alignment of the parameter and its states all
// elements are single ones, so the order of additions then differs; the memory that torch allocates is aligned.
template <class S, class Update, class C>
__device__ __forceinline__ void update_row(const Worker<S, Update>& work, int64_t begin, int64_t end, int lane,
                                           int lanes, bool aligned, bool grad_aligned, const Factors<C>& row,
                                           C threshold, Sums<C>& sums) {
  constexpr int64_t kSize = kPack<S>;
  int64_t first = (begin + kSize - 1) / kSize * kSize, last = end / kSize * kSize;
  if (!aligned || first >= last) first = last = end;
  using Work = Worker<S, Update>;
  const int64_t step = lanes * kSize;
  int64_t at = first + lane * kSize;
  // A loop without the alternative of gradients that are not aligned: the compiler makes a condition of it, and the
  // thread then waits for each pack before it loads the next one.
  for (; grad_aligned && at < last; at += Work::kAhead * step) {
    typename Work::template Loaded<kPack<S>> in[Work::kAhead];
#pragma unroll
    for (int i = 0; i < Work::kAhead; ++i)
      if (at + i * step < last) in[i] = work.template fetch<kPack<S>>(at + i * step, true);
#pragma unroll
    for (int i = 0; i < Work::kAhead; ++i)
      if (at + i * step < last) work.template update<kPack<S>>(at + i * step, in[i], true, row, threshold, sums);
  }
  for (; at < last; at += step) work.template run<kPack<S>>(at, row, threshold, sums);
  const int64_t before = first - begin, singles = before + end - last;
  for (int64_t i = lane; i < singles; i += lanes)
    work.template run<1>(i < before ? begin + i : last + i - before, row, threshold, sums);
}

template <class S, class Update>
__device__ inline void update_rows(const Table& table, const Entry& entry, const Chunk& chunk,
                                   const Conditions& conditions, const Worker<S, Update>& work) {
  using C = typename Compute<S>::Type;
  const int lanes = entry.lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes, group = static_cast<int>(threadIdx.x) / lanes;
  // All threads run the same number of iterations, because the fold of the sums synchronises them.
  for (int32_t first = chunk.row_begin; first < chunk.row_end; first += kThreads / lanes) {
    const int32_t row = first + group;
    Sums<C> sums = {};
    if (row < chunk.row_end) {
      const Factors<C> factors = factors_of<C>(table, entry, row, conditions);
      const C threshold = work.statistics ? table.rows.threshold[entry.start + row] : C(0);
      const int64_t begin = row * entry.inner;
      if (!work.skips(factors))
        update_row(work, begin + chunk.inner_begin, begin + chunk.inner_end, lane, lanes, entry.aligned,
                   entry.grad_aligned, factors, threshold, sums);
    }
    if (!work.statistics) continue;
    if (lanes <= kWarp) {
      fold_lanes(sums, lanes);
    } else {
      fold_block(sums);
    }
    if (lane == 0 && row < chunk.row_end) store_sums(table, entry, chunk.piece, row, sums);
  }
}

}  // namespace sparsekern::cuda
