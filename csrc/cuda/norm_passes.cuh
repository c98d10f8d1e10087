// The four passes of a normalisation over its tensors: the work of one thread on a pack of elements or on one element.
// The elements of a pack belong to one channel (kStep 0) or to one channel each (kStep 1). A pass provides
//
//   Channel         the numbers of a channel that it needs, computed once per tile
//   Sums, Part      what a thread sums for a channel, and the form in which a block merges it; kFolds: there are sums
//   store_part      stores the merged sums of a tile for a channel
//   read, use       loads a pack; computes with it and stores results
//   kPacksInFlight  packs that a thread loads before it uses the first one. The two blocks of a multiprocessor then have
//                   32 KB or more of loads in flight, as many as the latency of memory requires; 16 KB where registers
//                   are scarce
#pragma once

#include "activation.cuh"
#include "norm_parts.cuh"
#include "pack.cuh"

namespace sparsekern::cuda {

// Whether a pack has a channel that is not masked. If not, x is not read.
template <int kCount, int kStep, class Channel>
__device__ __forceinline__ bool any_live(const Channel* channels) {
  bool live = false;
#pragma unroll
  for (int k = 0; k < kCount; ++k) live = live || !channels[k * kStep].masked;
  return live;
}

struct NoSums {};

// scale = gamma / sqrt(var + eps) and shift = beta - mean * scale, in float64 as in the reference.
struct Affine {
  double scale, shift;
};

template <class C>
__device__ inline Affine affine_of(const Norm& norm, int64_t channel, C mean, C var) {
  const double rstd = 1 / sqrt(static_cast<double>(var) + norm.eps);
  const double scale = number_of<C>(norm.weight, channel, 1) * rstd;
  return {scale, number_of<C>(norm.bias, channel, 0) - static_cast<double>(mean) * scale};
}

// Mean and squared distances, taken about a pivot: the median of three elements of the tile, first, middle and last. All
// threads share it, so their sums only add up. The median is near the mean even where one of the three is far from it, so
// little precision is lost when the sums are shifted to the mean.
template <class S>
struct MomentsPass {
  using C = typename Compute<S>::Type;
  using Part = PivotSums;
  static constexpr bool kFolds = true;
  static constexpr int kPacksInFlight = 4;

  struct Channel {
    C pivot;
    bool masked;
  };
  struct Sums {
    C sum, square;
  };

  const NormCall& call;

  __device__ Channel channel(int64_t channel, const Place& at) const {
    if (is_masked(call.norm, channel)) return {C(0), true};
    const auto element = [&](int64_t outer, int64_t inner) {
      const int64_t index = (outer * call.norm.channels + channel) * call.norm.inner + inner;
      return widen(static_cast<const S*>(call.norm.x)[index]);
    };
    const int64_t last_outer = at.outer_end - 1, last_inner = at.inner_end - 1;
    const C a = element(at.outer_begin, at.inner_begin), c = element(last_outer, last_inner);
    const C b = element((at.outer_begin + last_outer) / 2, (at.inner_begin + last_inner) / 2);
    const C low = a < b ? a : b, high = a < b ? b : a;
    return {c < low ? low : c < high ? c : high, false};
  }

  template <int kCount, int kStep>
  __device__ __forceinline__ Pack<S, kCount> read(int64_t at, const Channel* channels) const {
    if (!any_live<kCount, kStep>(channels)) return {};
    return load<kCount>(static_cast<const S*>(call.norm.x) + at, call.aligned);
  }

  template <int kCount, int kStep>
  __device__ __forceinline__ void use(int64_t, const Pack<S, kCount>& x, const Channel* channels, Sums* sums) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const C difference = widen(x.values[k]) - channels[k * kStep].pivot;
      sums[k * kStep].sum += difference;
      sums[k * kStep].square += difference * difference;
    }
  }

  __device__ static Part part(const Sums& sums) {
    return {{static_cast<double>(sums.sum), static_cast<double>(sums.square)}};
  }

  __device__ void store_part(const Part& part, const Channel& channel, const Place& at, double* out) const {
    const double count = static_cast<double>((at.outer_end - at.outer_begin) * (at.inner_end - at.inner_begin));
    const double shift = part.values[0] / count, distances = part.values[1] - part.values[0] * shift;
    out[kTileCount] = count;
    out[kTileMean] = channel.pivot + shift;
    out[kTileDistances] = distances < 0 ? 0 : distances;
  }
};

template <class S, int32_t kActivation>
struct NormalisePass {
  using C = typename Compute<S>::Type;
  using Sums = NoSums;
  static constexpr bool kFolds = false;
  static constexpr int kPacksInFlight = 2;

  struct Channel {
    C scale, shift;
    bool masked;
  };
  template <int kCount>
  struct In {
    Pack<S, kCount> x = {}, residual = {};
  };

  const NormCall& call;

  // Where the batch's own mean and variance are not taken, what they are replaced by is passed on by the first tile.
  __device__ Channel channel(int64_t channel, const Place& at) const {
    const Norm& norm = call.norm;
    C& mean = static_cast<C*>(norm.mean)[channel];
    C& var = static_cast<C*>(norm.var)[channel];
    const C used_mean = norm.training ? mean : static_cast<const C*>(norm.running_mean)[channel];
    const C used_var = norm.training ? var : static_cast<const C*>(norm.running_var)[channel];
    if (!norm.training && at.piece == 0) mean = used_mean, var = used_var;
    const Affine affine = affine_of<C>(norm, channel, used_mean, used_var);
    return {static_cast<C>(affine.scale), static_cast<C>(affine.shift), is_masked(norm, channel)};
  }

  template <int kCount, int kStep>
  __device__ __forceinline__ In<kCount> read(int64_t at, const Channel* channels) const {
    const Norm& norm = call.norm;
    In<kCount> in;
    if (any_live<kCount, kStep>(channels)) in.x = load<kCount>(static_cast<const S*>(norm.x) + at, call.aligned);
    if (norm.residual != nullptr) in.residual = load<kCount>(static_cast<const S*>(norm.residual) + at, call.aligned);
    return in;
  }

  template <int kCount, int kStep>
  __device__ __forceinline__ void use(int64_t at, const In<kCount>& in, const Channel* channels, Sums*) const {
    const Norm& norm = call.norm;
    Pack<S, kCount> out;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const Channel& of = channels[k * kStep];
      C z = of.masked ? C(0) : widen(in.x.values[k]) * of.scale + of.shift;
      if (norm.residual != nullptr) z = z + widen(in.residual.values[k]);
      narrow(activate<kActivation>(z), &out.values[k]);
    }
    store(out, static_cast<S*>(norm.out) + at, call.aligned);
  }
};

// The inputs of both backward passes: a pack of x, residual and grad.
template <class S, int32_t kActivation, int kCount>
struct Incoming {
  using C = typename Compute<S>::Type;

  Pack<S, kCount> x = {}, residual = {}, grad = {};
  bool adds = false;

  Incoming() = default;

  // `live`: some channel is not masked. `residuals`: residuals of masked channels are needed.
  __device__ __forceinline__ Incoming(const NormCall& call, int64_t at, bool live, bool residuals) {
    const Norm& norm = call.norm;
    adds = norm.residual != nullptr;
    const bool needs_residual = adds && (live || residuals);
    if (live) x = load<kCount>(static_cast<const S*>(norm.x) + at, call.aligned);
    if (needs_residual) residual = load<kCount>(static_cast<const S*>(norm.residual) + at, call.aligned);
    if (live || needs_residual) grad = load<kCount>(static_cast<const S*>(norm.grad) + at, call.aligned);
  }

  // The gradient with respect to the input of the activation.
  template <class Channel>
  __device__ __forceinline__ C dz(int k, const Channel& channel) const {
    C z = channel.masked ? C(0) : widen(x.values[k]) * channel.scale + channel.shift;
    if (adds) z = z + widen(residual.values[k]);
    return gradient_of<kActivation>(widen(grad.values[k]), z);
  }
};

template <class S, int32_t kActivation>
struct GradSumsPass {
  using C = typename Compute<S>::Type;
  using Part = GradSums;
  static constexpr bool kFolds = true;
  // Eight channels a thread leave no registers for a second pack.
  static constexpr int kPacksInFlight = sizeof(S) == 2 ? 1 : 2;

  struct Channel {
    C scale, shift, mean, threshold;
    bool masked;
  };
  struct Sums {
    C grad, dot, square;
    int32_t count;
  };

  const NormCall& call;

  __device__ Channel channel(int64_t channel, const Place&) const {
    const Norm& norm = call.norm;
    const C mean = static_cast<const C*>(norm.mean)[channel];
    const Affine affine = affine_of<C>(norm, channel, mean, static_cast<const C*>(norm.var)[channel]);
    const C threshold = norm.threshold == nullptr ? C(0) : C(norm.threshold[channel]);
    return {static_cast<C>(affine.scale), static_cast<C>(affine.shift), mean, threshold, is_masked(norm, channel)};
  }

  template <int kCount, int kStep>
  __device__ __forceinline__ Incoming<S, kActivation, kCount> read(int64_t at, const Channel* channels) const {
    const bool live = any_live<kCount, kStep>(channels);
    return {call, at, live, live};
  }

  template <int kCount, int kStep>
  __device__ __forceinline__ void use(int64_t, const Incoming<S, kActivation, kCount>& in, const Channel* channels,
                                      Sums* sums) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const Channel& of = channels[k * kStep];
      Sums& sum = sums[k * kStep];
      const C dz = in.dz(k, of);
      sum.grad += dz;
      sum.dot += dz * (widen(in.x.values[k]) - of.mean);
      sum.square += dz * dz;
      sum.count += (dz < C(0) ? -dz : dz) > of.threshold;
    }
  }

  __device__ static Part part(const Sums& sums) {
    return {{static_cast<double>(sums.grad), static_cast<double>(sums.dot), static_cast<double>(sums.square),
             static_cast<double>(sums.count)}};
  }

  __device__ void store_part(const Part& part, const Channel&, const Place&, double* out) const {
    for (int i = 0; i < Part::kSize; ++i) out[i] = part.values[i];
  }
};

// The gradients of x and the residual.
template <class S, int32_t kActivation>
struct BackwardPass {
  using C = typename Compute<S>::Type;
  using Sums = NoSums;
  static constexpr bool kFolds = false;
  static constexpr int kPacksInFlight = 2;

  struct Channel {
    C scale, shift, mean, slope, offset;
    bool masked;
  };

  const NormCall& call;

  __device__ Channel channel(int64_t channel, const Place&) const {
    const Norm& norm = call.norm;
    const C mean = static_cast<const C*>(norm.mean)[channel], var = static_cast<const C*>(norm.var)[channel];
    const Affine affine = affine_of<C>(norm, channel, mean, var);
    const double* sums = folded_sums_of(call, channel);
    const double elements = elements_of(norm);
    const double slope = -affine.scale * (sums[1] / elements) / (static_cast<double>(var) + norm.eps);
    const double offset = -affine.scale * (sums[0] / elements);
    return {static_cast<C>(affine.scale), static_cast<C>(affine.shift), mean,
            static_cast<C>(slope),        static_cast<C>(offset),       is_masked(norm, channel)};
  }

  template <int kCount, int kStep>
  __device__ __forceinline__ Incoming<S, kActivation, kCount> read(int64_t at, const Channel* channels) const {
    return {call, at, any_live<kCount, kStep>(channels), true};
  }

  template <int kCount, int kStep>
  __device__ __forceinline__ void use(int64_t at, const Incoming<S, kActivation, kCount>& in, const Channel* channels,
                                      Sums*) const {
    const Norm& norm = call.norm;
    Pack<S, kCount> grad_x, grad_residual;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const Channel& of = channels[k * kStep];
      const C dz = in.dz(k, of);
      C grad = dz * of.scale;
      if (norm.training) grad = grad + ((widen(in.x.values[k]) - of.mean) * of.slope + of.offset);
      narrow(of.masked ? C(0) : grad, &grad_x.values[k]);
      narrow(dz, &grad_residual.values[k]);
    }
    store(grad_x, static_cast<S*>(norm.out) + at, call.aligned);
    if (in.adds) store(grad_residual, static_cast<S*>(norm.grad_residual) + at, call.aligned);
  }
};

}  // namespace sparsekern::cuda
