// The four passes of a normalisation over its tensors: the work of one thread on a pack of elements or on one element.
// The elements of a pack belong to one channel (kStep 0) or to one channel each (kStep 1). A pass provides
//
//   Channel         the numbers of a channel that it needs, computed once per tile
//   Sums, Part      what a thread sums for a channel, and the form in which a tile stores it; kFolds: there are sums
//   read, use       loads a pack; computes with it and stores results
//   kPacksInFlight  packs that a thread loads before it uses the first one. The blocks of a multiprocessor then have 16
//   KB
//                   or more of loads in flight, as many as the latency of memory requires
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

// Mean and squared distances, taken about the first element that the thread reads. That element is one of those summed,
// so little precision is lost when the sums are shifted to the mean, however far the element is from it.
template <class S>
struct MomentsPass {
  using C = typename Compute<S>::Type;
  using Part = ChannelMoments;
  static constexpr bool kFolds = true;
  static constexpr int kPacksInFlight = 2;

  struct Channel {
    bool masked;
  };
  struct Sums {
    C pivot, sum, square;
    int32_t count;
  };

  const NormCall& call;

  __device__ Channel channel(int64_t channel, bool) const { return {is_masked(call.norm, channel)}; }

  template <int kCount, int kStep>
  __device__ __forceinline__ Pack<S, kCount> read(int64_t at, const Channel* channels) const {
    if (!any_live<kCount, kStep>(channels)) return {};
    return load<kCount>(static_cast<const S*>(call.norm.x) + at, call.aligned);
  }

  template <int kCount, int kStep>
  __device__ __forceinline__ void use(int64_t, const Pack<S, kCount>& x, const Channel*, Sums* sums) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      Sums& of = sums[k * kStep];
      const C value = widen(x.values[k]);
      if ((kStep == 1 || k == 0) && of.count == 0) of.pivot = value;
      const C difference = value - of.pivot;
      of.sum += difference;
      of.square += difference * difference;
      ++of.count;
    }
  }

  __device__ static Part part(const Sums& sums) {
    if (sums.count == 0) return {};
    const double count = sums.count, sum = sums.sum, distances = sums.square - sum * sum / count;
    return {{count, sums.pivot + sum / count, distances < 0 ? 0 : distances, 0}};
  }
};

template <class S, int32_t kActivation>
struct NormalisePass {
  using C = typename Compute<S>::Type;
  using Part = ChannelMoments;
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
  __device__ Channel channel(int64_t channel, bool first) const {
    const Norm& norm = call.norm;
    C& mean = static_cast<C*>(norm.mean)[channel];
    C& var = static_cast<C*>(norm.var)[channel];
    const C used_mean = norm.training ? mean : static_cast<const C*>(norm.running_mean)[channel];
    const C used_var = norm.training ? var : static_cast<const C*>(norm.running_var)[channel];
    if (!norm.training && first) mean = used_mean, var = used_var;
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
  bool adds;

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
  static constexpr int kPacksInFlight = 1;

  struct Channel {
    C scale, shift, mean, threshold;
    bool masked;
  };
  struct Sums {
    C grad, dot, square;
    int32_t count;
  };

  const NormCall& call;

  __device__ Channel channel(int64_t channel, bool) const {
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
};

// The gradients of x and the residual.
template <class S, int32_t kActivation>
struct BackwardPass {
  using C = typename Compute<S>::Type;
  using Part = GradSums;
  using Sums = NoSums;
  static constexpr bool kFolds = false;
  static constexpr int kPacksInFlight = 1;

  struct Channel {
    C scale, shift, mean, slope, offset;
    bool masked;
  };

  const NormCall& call;

  __device__ Channel channel(int64_t channel, bool) const {
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
