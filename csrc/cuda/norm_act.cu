// The small launches between and after the passes of a normalisation. One warp for each channel merges its tiles and
// updates the running statistics, and one block updates the gradient counts of all channels.
#include "launch.h"
#include "norm_parts.cuh"

namespace sparsekern::cuda {
namespace {

// Small blocks: channels are few, and each reads many tiles.
constexpr int kChannels = 2, kMergeThreads = kChannels * kWarp;

__device__ int64_t channel_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kChannels + threadIdx.x / kWarp;
}

// Adds up take(numbers of a tile) over all tiles of a channel. All lanes of the calling warp have the result.
template <class Part, class Take>
__device__ Part merge_pieces(const NormCall& call, int64_t channel, const Take& take) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  Part all = {};
  for (int64_t piece = lane; piece < call.cut.pieces; piece += kWarp) all.merge(take(part_of(call, channel, piece)));
  merge_lanes(all, kWarp);
  return all;
}

// Mean of a channel, and the sum of the squared distances from it. The second reading takes the distances from the mean
// of all tiles, so that there is no division for each tile.
struct ChannelMoments {
  double mean, distances;
};

__device__ ChannelMoments moments_of(const NormCall& call, int64_t channel) {
  const double elements = elements_of(call.norm);
  const auto sum = [](const double* of) { return Added<1>{{of[kTileCount] * of[kTileMean]}}; };
  const double mean = merge_pieces<Added<1>>(call, channel, sum).values[0] / elements;
  const auto distances = [mean](const double* of) {
    const double difference = of[kTileMean] - mean;
    return Added<1>{{of[kTileDistances] + of[kTileCount] * (difference * difference)}};
  };
  return {mean, merge_pieces<Added<1>>(call, channel, distances).values[0]};
}

// Updates a running statistic by torch's lerp.
template <class C>
__device__ void blend(void* running, int64_t channel, C value, C weight) {
  C& own = static_cast<C*>(running)[channel];
  own = weight < C(0.5) ? own + weight * (value - own) : value - (value - own) * (1 - weight);
}

template <class C>
__global__ void __launch_bounds__(kMergeThreads) store_moments(const NormCall __grid_constant__ call) {
  const Norm& norm = call.norm;
  const int64_t channel = channel_of_warp();
  if (channel >= norm.channels) return;
  const double elements = elements_of(norm);
  const bool masked = is_masked(norm, channel);
  ChannelMoments all = {};
  if (!masked) all = moments_of(call, channel);
  if (threadIdx.x % kWarp != 0) return;
  C mean = static_cast<C>(all.mean), var = static_cast<C>(all.distances / elements);
  if (masked) {
    // The factor cancels that of the unbiased variance below.
    mean = static_cast<C>(number_of<C>(norm.running_mean, channel, 0));
    var = static_cast<C>(number_of<C>(norm.running_var, channel, 1)) * static_cast<C>((elements - 1) / elements);
  }
  static_cast<C*>(norm.mean)[channel] = mean;
  static_cast<C*>(norm.var)[channel] = var;
  if (norm.momentum == 0) return;
  blend<C>(norm.running_mean, channel, mean, static_cast<C>(norm.momentum));
  blend<C>(norm.running_var, channel, var * static_cast<C>(elements / (elements - 1)), static_cast<C>(norm.momentum));
}

template <class C>
__global__ void __launch_bounds__(kMergeThreads) store_sums(const NormCall __grid_constant__ call) {
  const Norm& norm = call.norm;
  const int64_t channel = channel_of_warp();
  if (channel >= norm.channels) return;
  GradSums all = {};
  const bool masked = is_masked(norm, channel);
  const auto sums = [](const double* of) { return GradSums{{of[0], of[1], of[2], of[3]}}; };
  if (!masked) all = merge_pieces<GradSums>(call, channel, sums);
  if (threadIdx.x % kWarp != 0) return;
  for (int i = 0; i < GradSums::kSize; ++i) folded_sums_of(call, channel)[i] = all.values[i];
  const double rstd = 1 / sqrt(number_of<C>(norm.var, channel, 1) + norm.eps);
  // The variance of a masked channel is arbitrary.
  static_cast<C*>(norm.grad_weight)[channel] = masked ? C(0) : static_cast<C>(all.values[1] * rstd);
  static_cast<C*>(norm.grad_bias)[channel] = static_cast<C>(all.values[0]);
}

// Over the counted channels: the sum of the squares of (gradient * norm of its channel), and their number.
struct Total {
  double squares;
  int64_t channels;
};

// Adds up the totals of all threads of the block and gives every thread the result.
__device__ Total total_of_block(const Total& mine) {
  __shared__ Total all[kFinishThreads];
  all[threadIdx.x] = mine;
  for (int reach = kFinishThreads / 2; reach > 0; reach /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) >= reach) continue;
    all[threadIdx.x].squares += all[threadIdx.x + reach].squares;
    all[threadIdx.x].channels += all[threadIdx.x + reach].channels;
  }
  __syncthreads();
  return all[0];
}

template <class C>
__device__ double norm_sq_of(const Norm& norm, int64_t channel) {
  const double gamma = number_of<C>(norm.weight, channel, 1), beta = number_of<C>(norm.bias, channel, 0);
  return gamma * gamma + beta * beta;
}

template <class C>
__global__ void __launch_bounds__(kFinishThreads) update_counts(const NormCall __grid_constant__ call) {
  const Norm& norm = call.norm;
  const double elements = elements_of(norm);
  const auto counts = [&](int64_t channel, double norm_sq) {
    return !is_masked(norm, channel) && finite(folded_sums_of(call, channel)[2]) && finite(norm_sq);
  };
  Total mine = {};
  for (int64_t channel = threadIdx.x; channel < norm.channels; channel += kFinishThreads) {
    const double norm_sq = norm_sq_of<C>(norm, channel);
    if (!counts(channel, norm_sq)) continue;
    mine.squares += folded_sums_of(call, channel)[2] * norm_sq;
    ++mine.channels;
  }
  const Total total = total_of_block(mine);
  const double rms = sqrt(total.squares / (static_cast<double>(total.channels) * elements));
  const float keep = static_cast<float>(norm.decay), one_minus_decay = static_cast<float>(1 - norm.decay);
  for (int64_t channel = threadIdx.x; channel < norm.channels; channel += kFinishThreads) {
    const double norm_sq = norm_sq_of<C>(norm, channel);
    if (!counts(channel, norm_sq)) continue;
    const float share = static_cast<float>(folded_sums_of(call, channel)[3] / elements);
    norm.activity[channel] = norm.activity[channel] * keep + share * one_minus_decay;
    norm.threshold[channel] =
        norm_sq == 0 ? __int_as_float(0x7f800000) : static_cast<float>(norm.tau * rms / sqrt(norm_sq));
  }
  if (threadIdx.x == 0) *norm.updates += 1;
}

int64_t blocks_of(const NormCall& call) {
  return (call.norm.channels + kChannels - 1) / kChannels;
}

}  // namespace

cudaError_t fold_norm_moments(const NormCall& call, cudaStream_t stream) {
  return call.norm.dtype == kFloat64 ? launch(store_moments<double>, blocks_of(call), kMergeThreads, call, stream)
                                     : launch(store_moments<float>, blocks_of(call), kMergeThreads, call, stream);
}

cudaError_t fold_norm_sums(const NormCall& call, cudaStream_t stream) {
  return call.norm.dtype == kFloat64 ? launch(store_sums<double>, blocks_of(call), kMergeThreads, call, stream)
                                     : launch(store_sums<float>, blocks_of(call), kMergeThreads, call, stream);
}

cudaError_t count_norm(const NormCall& call, cudaStream_t stream) {
  return call.norm.dtype == kFloat64 ? launch(update_counts<double>, 1, kFinishThreads, call, stream)
                                     : launch(update_counts<float>, 1, kFinishThreads, call, stream);
}

}  // namespace sparsekern::cuda
