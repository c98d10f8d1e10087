// The second launch of a step. One block for each tensor folds the partial sums of its rows in the order of their
// pieces, and updates means, thresholds, countdowns and the step counter.
#include "factors.cuh"
#include "kernels.h"
#include "pack.cuh"
#include "sums.cuh"

namespace sparsekern::cuda {
namespace {

// Rows of a tensor that are counted, live rows with a sum that is not finite, and a sum over the counted rows.
struct RowCounts {
  double total;  // squares of (gradient element * norm of its row)
  int32_t counted, nonfinite;

  __device__ void operator+=(const RowCounts& other) {
    total += other.total;
    counted += other.counted;
    nonfinite += other.nonfinite;
  }
};

// Adds up the counts of all threads of the block and gives every thread the total.
__device__ RowCounts fold(const RowCounts& mine) {
  __shared__ RowCounts all[kFinishThreads];
  all[threadIdx.x] = mine;
  for (int reach = kFinishThreads / 2; reach > 0; reach /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < reach) all[threadIdx.x] += all[threadIdx.x + reach];
  }
  __syncthreads();
  return all[0];
}

__device__ RowSums fold_pieces(const Table& table, const Entry& entry, int32_t row) {
  const auto part = [&](int32_t piece) {
    const int64_t at = entry.partial + static_cast<int64_t>(piece) * entry.rows + row;
    return load<kSums>(table.partials + at * kSums, table.sums_aligned);
  };
  RowSums sums = part(0);
  for (int32_t piece = 1; piece < entry.pieces; ++piece) {
    const RowSums next = part(piece);
    for (int s = 0; s < kSums; ++s) sums.values[s] += next.values[s];
  }
  return sums;
}

// Folds the sums of a row. It is counted if it is not masked and its four sums are finite. The sums of other rows
// become 0. The threshold of a counted row is marked as due with a negative number, which a threshold never is.
__device__ void fold_row(const Table& table, const Entry& entry, int32_t row, RowCounts& rows) {
  const int64_t r = static_cast<int64_t>(entry.start) + row;
  float* out = table.rows.sums + r * kSums;
  const bool live = table.rows.countdown[r] != 0;
  const RowSums taken = live && entry.pieces > 1 ? fold_pieces(table, entry, row)
                                                 : load<kSums>(const_cast<const float*>(out), table.sums_aligned);
  const float (&sums)[kSums] = taken.values;
  const bool is_finite = finite(sums[0]) && finite(sums[1]) && finite(sums[2]) && finite(sums[3]);
  const bool is_counted = live && is_finite;
  store(is_counted ? taken : RowSums{}, out, table.sums_aligned);
  rows.nonfinite += live && !is_finite;
  if (!is_counted) return;
  ++rows.counted;
  rows.total += static_cast<double>(sums[2]) * static_cast<double>(sums[3]);
  table.rows.threshold[r] = -1.0f;
}

// Updates the mean activity and the threshold of a row that is counted. The activity has to wait for this loop: for
// sm_100 the compiler would keep the totals of the other loop in local memory around its division.
__device__ void update_row(const Table& table, const Entry& entry, int32_t row, double scaled_rms) {
  const int64_t r = static_cast<int64_t>(entry.start) + row;
  if (!(table.rows.threshold[r] < 0)) return;
  const float* sums = table.rows.sums + r * kSums;
  const float keep = static_cast<float>(table.hyper.decay), one_minus_decay = static_cast<float>(1 - table.hyper.decay);
  table.rows.activity[r] = table.rows.activity[r] * keep + sums[0] / table.rows.elements[r] * one_minus_decay;
  const double weight_sq = sums[3];
  table.rows.threshold[r] =
      weight_sq == 0 ? __int_as_float(0x7f800000) : static_cast<float>(scaled_rms / sqrt(weight_sq));
}

// Called by whole blocks. One thread works on a row from beginning to end.
__device__ void finish_statistics(const Table& table, const Entry& entry) {
  RowCounts mine = {};
  for (int32_t row = static_cast<int32_t>(threadIdx.x); row < entry.rows; row += kFinishThreads)
    fold_row(table, entry, row, mine);
  const RowCounts rows = fold(mine);
  const double elements = static_cast<double>(rows.counted) * static_cast<double>(table.rows.elements[entry.start]);
  const double scaled_rms = table.hyper.tau * sqrt(rows.total / elements);
  for (int32_t row = static_cast<int32_t>(threadIdx.x); row < entry.rows; row += kFinishThreads)
    update_row(table, entry, row, scaled_rms);
  if (threadIdx.x > 0) return;
  atomicExch(table.rows.pending, 1.0f);  // by one block for each tensor
  if (rows.nonfinite > 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(table.rows.nonfinite),
              static_cast<unsigned long long>(rows.nonfinite));
}

template <class Argument>
__global__ void __launch_bounds__(kFinishThreads) finish(const Argument __grid_constant__ list) {
  const Table& table = list.table;
  const Conditions conditions = conditions_of(table);
  if (!conditions.apply) return;
  const Entry& entry = list.entries[blockIdx.x];
  if (table.counts && threadIdx.x == 0) *entry.step += 1;
  if (entry.start < 0 || !conditions.update_statistics) return;
  if (table.statistics) finish_statistics(table, entry);
  if (!table.fades) return;
  for (int32_t row = static_cast<int32_t>(threadIdx.x); row < entry.rows; row += kFinishThreads) {
    int32_t& countdown = table.rows.countdown[static_cast<int64_t>(entry.start) + row];
    countdown -= countdown > 0;
  }
}

}  // namespace

cudaError_t finish_step(const ManyTensors& list, cudaStream_t stream) {
  const int32_t tensors = list.table.tensors;
  return tensors <= kFewTensors ? launch(finish<FewTensors>, tensors, kFinishThreads, few_of(list), stream)
                                : launch(finish<ManyTensors>, tensors, kFinishThreads, list, stream);
}

cudaError_t try_device() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, finish<FewTensors>);
}

}  // namespace sparsekern::cuda
