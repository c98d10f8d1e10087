// The second launch of a step: one block for each tensor folds the sums of its rows, in the order of their pieces, and
// updates means, thresholds, countdowns and the step counter.
#include "factors.cuh"
#include "kernels.h"

namespace sparsekern::cuda {
namespace {

// What was found about the rows of a tensor.
struct Found {
  double total;  // of the squares of (gradient times norm of its row)
  int32_t counted, spoilt;

  __device__ void operator+=(const Found& other) {
    total += other.total;
    counted += other.counted;
    spoilt += other.spoilt;
  }
};

// What every thread found, together; all threads get it.
__device__ Found fold(const Found& mine) {
  __shared__ Found all[kFinishThreads];
  all[threadIdx.x] = mine;
  for (int reach = kFinishThreads / 2; reach > 0; reach /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < reach) all[threadIdx.x] += all[threadIdx.x + reach];
  }
  __syncthreads();
  return all[0];
}

__device__ void fold_pieces(const Table& table, const Entry& entry, int32_t row, float (&sums)[kSums]) {
  for (int32_t piece = 0; piece < entry.pieces; ++piece) {
    const float* part = table.partials + (entry.partial + static_cast<int64_t>(piece) * entry.rows + row) * kSums;
    for (int s = 0; s < kSums; ++s) sums[s] = piece == 0 ? part[s] : sums[s] + part[s];
  }
}

// Sums and mean activity of one row. A row that is masked or whose sums are not finite does not count, and has sums of
// 0; the threshold of another one (never negative otherwise) is marked as due.
__device__ void look_at_row(const Table& table, const Entry& entry, int32_t row, Found& found) {
  const int64_t r = static_cast<int64_t>(entry.start) + row;
  float* out = table.rows.sums + r * kSums;
  float sums[kSums] = {out[0], out[1], out[2], out[3]};
  const bool alive = table.rows.countdown[r] != 0;
  if (alive && entry.pieces > 1) fold_pieces(table, entry, row, sums);
  const bool sound = finite(sums[0]) && finite(sums[1]) && finite(sums[2]) && finite(sums[3]);
  const bool counts = alive && sound;
  for (int s = 0; s < kSums; ++s) out[s] = counts ? sums[s] : 0.0f;
  found.spoilt += alive && !sound;
  if (!counts) return;
  ++found.counted;
  found.total += static_cast<double>(sums[2]) * static_cast<double>(sums[3]);
  const float keep = static_cast<float>(table.hyper.decay), one_minus_decay = static_cast<float>(1 - table.hyper.decay);
  table.rows.activity[r] = table.rows.activity[r] * keep + sums[0] / table.rows.elements[r] * one_minus_decay;
  table.rows.threshold[r] = -1.0f;
}

__device__ void set_threshold(const Table& table, const Entry& entry, int32_t row, double scaled_rms) {
  const int64_t r = static_cast<int64_t>(entry.start) + row;
  if (!(table.rows.threshold[r] < 0)) return;
  const double weight_sq = table.rows.sums[r * kSums + 3];
  table.rows.threshold[r] =
      weight_sq == 0 ? __int_as_float(0x7f800000) : static_cast<float>(scaled_rms / sqrt(weight_sq));
}

// Called by whole blocks. A row is looked at by the same thread throughout.
__device__ void finish_statistics(const Table& table, const Entry& entry) {
  Found mine = {};
  for (int32_t row = static_cast<int32_t>(threadIdx.x); row < entry.rows; row += kFinishThreads)
    look_at_row(table, entry, row, mine);
  const Found found = fold(mine);
  const double elements = static_cast<double>(found.counted) * static_cast<double>(table.rows.elements[entry.start]);
  const double scaled_rms = table.hyper.tau * sqrt(found.total / elements);
  for (int32_t row = static_cast<int32_t>(threadIdx.x); row < entry.rows; row += kFinishThreads)
    set_threshold(table, entry, row, scaled_rms);
  if (threadIdx.x > 0) return;
  *table.rows.pending = 1;
  if (found.spoilt > 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(table.rows.nonfinite),
              static_cast<unsigned long long>(found.spoilt));
}

__global__ void __launch_bounds__(kFinishThreads) finish(const Table __grid_constant__ table) {
  const Conditions conditions = conditions_of(table);
  if (!conditions.apply) return;
  const Entry& entry = table.entries[blockIdx.x];
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

cudaError_t finish_step(const Table& table, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(table.tensors));
  config.blockDim = dim3(kFinishThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, finish, table);
}

cudaError_t try_device() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, finish);
}

}  // namespace sparsekern::cuda
