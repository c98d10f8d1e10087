// The kernel of a pass of a normalisation, with one block for each tile.
#pragma once

#include "launch.h"
#include "norm_passes.cuh"

namespace sparsekern::cuda {

// Maximum number of channels of a tile: 32 packs of eight, or one for each thread.
constexpr int kTileChannels = 256;

__device__ inline Place place_of(const NormCall& call) {
  const NormCut& cut = call.cut;
  const int32_t thread = static_cast<int32_t>(threadIdx.x), block_slots = cut.lanes * cut.slots;
  Place at;
  at.piece = blockIdx.x % cut.pieces;
  at.channel_begin = blockIdx.x / cut.pieces * cut.slots * cut.width;
  at.outer_begin = at.piece / cut.inner_pieces * cut.outer_step;
  at.inner_begin = at.piece % cut.inner_pieces * cut.inner_step;
  at.outer_end = minimum(call.norm.outer, at.outer_begin + cut.outer_step);
  at.inner_end = minimum(call.norm.inner, at.inner_begin + cut.inner_step);
  at.lane = thread % cut.lanes;
  at.slot = thread / cut.lanes % cut.slots;
  at.way = thread / block_slots;
  at.ways = kThreads / block_slots;
  return at;
}

// Applies a pass to the packs at `first`, `first + step`, ... below `end`.
template <int kCount, int kStep, class Pass>
__device__ __forceinline__ void pass_over(const Pass& pass, int64_t first, int64_t end, int64_t step,
                                          const typename Pass::Channel* channels, typename Pass::Sums* sums) {
  using In = decltype(pass.template read<kCount, kStep>(first, channels));
  constexpr int kAhead = Pass::kPacksInFlight;
  for (; kAhead > 1 && first + (kAhead - 1) * step < end; first += kAhead * step) {
    In in[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) in[i] = pass.template read<kCount, kStep>(first + i * step, channels);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) pass.template use<kCount, kStep>(first + i * step, in[i], channels, sums);
  }
  for (; first < end; first += step) {
    const In in = pass.template read<kCount, kStep>(first, channels);
    pass.template use<kCount, kStep>(first, in, channels, sums);
  }
}

// For inner > 1: whole packs at multiples of the pack size, and single elements at both ends of a channel's plane.
template <class S, class Pass>
__device__ __forceinline__ void pass_over_planes(const Pass& pass, const NormCall& call, const Place& at,
                                                 const typename Pass::Channel* channel, typename Pass::Sums* sums) {
  constexpr int64_t kSize = kPack<S>;
  const int64_t lane = at.lane, lanes = call.cut.lanes;
  for (int64_t outer = at.outer_begin + at.way; outer < at.outer_end; outer += at.ways) {
    const int64_t plane = (outer * call.norm.channels + at.channel_begin + at.slot) * call.norm.inner;
    const int64_t begin = plane + at.inner_begin, end = plane + at.inner_end;
    int64_t first = (begin + kSize - 1) / kSize * kSize, last = end / kSize * kSize;
    if (first >= last) first = last = end;
    pass_over<kPack<S>, 0>(pass, first + lane * kSize, last, lanes * kSize, channel, sums);
    const int64_t before = first - begin, singles = before + end - last;
    for (int64_t i = lane; i < singles; i += lanes) {
      const int64_t index = i < before ? begin + i : last + i - before;
      pass.template use<1, 0>(index, pass.template read<1, 0>(index, channel), channel, sums);
    }
  }
}

// For inner == 1: neighbouring channels, kWidth of them for each thread.
template <int kWidth, class Pass>
__device__ __forceinline__ void pass_over_channels(const Pass& pass, const NormCall& call, const Place& at,
                                                   const typename Pass::Channel* channels, typename Pass::Sums* sums) {
  const int64_t step = call.norm.channels, first = at.channel_begin + at.slot * kWidth;
  pass_over<kWidth, 1>(pass, (at.outer_begin + at.way) * step + first, at.outer_end * step, at.ways * step, channels,
                       sums);
}

// Merges the sums of the threads of a block for `kWidth` channels of each slot, from number `begin` on, and stores them.
// The lanes of a warp that share a slot are merged by halves. What is left goes through shared memory as a table with a
// row for each group of lanes of a slot and a column for each channel. `folders` threads take the rows of a column in
// turn, so that all threads of the block merge at once. Called by whole blocks.
template <class Pass, int kWidth>
__device__ inline void fold_tile(const Pass& pass, const NormCall& call, const Place& at, int32_t begin,
                                 const typename Pass::Sums* sums, const typename Pass::Channel* of_tile) {
  using Part = typename Pass::Part;
  __shared__ double parts[Part::kSize][kThreads * kWidth];
  const int32_t slots = call.cut.slots, lanes = call.cut.lanes < kWarp ? call.cut.lanes : kWarp;
  const int32_t thread = static_cast<int32_t>(threadIdx.x), folders = call.cut.folders;
  const int32_t size = kThreads / lanes * kWidth, columns = slots * kWidth;
  __syncthreads();  // earlier reads of `parts` are complete
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    Part part = Pass::part(sums[k]);
    merge_lanes(part, lanes);
    if (thread % lanes == 0)
      for (int i = 0; i < Part::kSize; ++i) parts[i][thread / lanes * kWidth + k] = part.values[i];
  }
  __syncthreads();
  const int32_t column = thread / folders;
  Part all = {};
  for (int32_t from = thread % folders * columns + column; column < columns && from < size; from += folders * columns) {
    Part part;
    for (int i = 0; i < Part::kSize; ++i) part.values[i] = parts[i][from];
    all.merge(part);
  }
  merge_lanes(all, folders);
  const int32_t of = column / kWidth * call.cut.width + begin + column % kWidth;
  const int64_t channel = at.channel_begin + of;
  if (thread % folders != 0 || column >= columns || channel >= call.norm.channels) return;
  pass.store_part(all, of_tile[of], at, part_of(call, channel, at.piece));
}

template <class S, class Pass, int kWidth>
__device__ inline void run_tile(const Pass& pass, const NormCall& call, const Place& at,
                                const typename Pass::Channel* of_tile) {
  typename Pass::Channel channels[kWidth];
  typename Pass::Sums sums[kWidth] = {};
#pragma unroll
  for (int k = 0; k < kWidth; ++k) channels[k] = of_tile[at.slot * kWidth + k];
  // Threads past the last channel only take part in the fold.
  if (at.channel_begin + at.slot * kWidth < call.norm.channels) {
    if (kWidth == 1 && call.norm.inner > 1) {
      pass_over_planes<S>(pass, call, at, channels, sums);
    } else {
      pass_over_channels<kWidth>(pass, call, at, channels, sums);
    }
  }
  if constexpr (Pass::kFolds) {
    constexpr int kMerged = kWidth < kFoldWidth ? kWidth : kFoldWidth;
#pragma unroll
    for (int k = 0; k < kWidth; k += kMerged)
      fold_tile<Pass, kMerged>(pass, call, at, k, sums + k, of_tile);
  }
}

// Minimum number of blocks per multiprocessor, as in step.cuh.
constexpr int kNormBlocks = 2;

template <class S, class Pass>
__global__ void __launch_bounds__(kThreads, kNormBlocks) norm_pass(const NormCall __grid_constant__ call) {
  __shared__ typename Pass::Channel of_tile[kTileChannels];
  const Pass pass = {call};
  const Place at = place_of(call);
  const int32_t tile = call.cut.slots * call.cut.width, thread = static_cast<int32_t>(threadIdx.x);
  if (thread < tile && at.channel_begin + thread < call.norm.channels)
    of_tile[thread] = pass.channel(at.channel_begin + thread, at);
  __syncthreads();
  if (call.cut.width == 1) {
    run_tile<S, Pass, 1>(pass, call, at, of_tile);
  } else {
    run_tile<S, Pass, kPack<S>>(pass, call, at, of_tile);
  }
}

template <class S, class Pass>
cudaError_t launch_norm(const NormCall& call, cudaStream_t stream) {
  return launch(norm_pass<S, Pass>, call.cut.blocks, kThreads, call, stream);
}

template <class S, template <class, int32_t> class Pass>
cudaError_t launch_norm_of(const NormCall& call, cudaStream_t stream) {
  switch (call.norm.activation) {
    case kRelu: return launch_norm<S, Pass<S, kRelu>>(call, stream);
    case kRelu6: return launch_norm<S, Pass<S, kRelu6>>(call, stream);
    case kHardswish: return launch_norm<S, Pass<S, kHardswish>>(call, stream);
    case kSilu: return launch_norm<S, Pass<S, kSilu>>(call, stream);
    default: return launch_norm<S, Pass<S, kIdentity>>(call, stream);
  }
}

// The kernels of one dtype.
template <class S>
cudaError_t launch_norm_pass(NormPass pass, const NormCall& call, cudaStream_t stream) {
  switch (pass) {
    case kMomentsPass: return launch_norm<S, MomentsPass<S>>(call, stream);
    case kNormalisePass: return launch_norm_of<S, NormalisePass>(call, stream);
    case kGradSumsPass: return launch_norm_of<S, GradSumsPass>(call, stream);
    default: return launch_norm_of<S, BackwardPass>(call, stream);
  }
}

}  // namespace sparsekern::cuda
