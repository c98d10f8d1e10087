// The sums of a batch normalisation: the moments of its input, and the sums that its gradient needs. They are taken in
// lanes of the compute type over a block, and in float64 over blocks.
#pragma once

#include "norm.h"

SPARSEKERN_BEGIN_ISA

// Elements that are summed in the compute type before their sum goes to float64.
constexpr int64_t kNormBlock = 2048;

// kCount sums in each lane of some vectors.
template <class C, int kCount, int kVectors>
struct SumLanesOf {
  using V = Vectors<C>;

  typename V::Vector sum[kCount] = {};
  SumLanesOf<C, kCount, kVectors - 1> rest;

  // Adds the terms of the elements from `i` on.
  template <class Terms>
  SPARSEKERN_INLINE void add(const Terms& terms, int64_t i) {
    terms.first(i, sum);
    rest.add(terms.rest, i + V::kWidth);
  }

  // Stores the lanes of each sum in `lanes`, in planes of `plane` numbers.
  SPARSEKERN_INLINE void store(C* lanes, int64_t plane) const {
    for (int s = 0; s < kCount; ++s) V::store(sum[s], lanes + s * plane);
    rest.store(lanes + V::kWidth, plane);
  }
};

template <class C, int kCount>
struct SumLanesOf<C, kCount, 0> {
  template <class Terms>
  SPARSEKERN_INLINE void add(const Terms&, int64_t) {}
  void store(C*, int64_t) const {}
};

template <class C, int kCount>
using SumLanes = SumLanesOf<C, kCount, kLaneVectors<C>>;

typedef double FourDoubles __attribute__((vector_size(4 * sizeof(double))));

SPARSEKERN_INLINE void widen(const double* from, FourDoubles& four) {
  __builtin_memcpy(&four, from, sizeof(four));
}

SPARSEKERN_INLINE void widen(const float* from, FourDoubles& four) {
#if defined(__AVX512F__)
  four = (FourDoubles)_mm256_cvtps_pd(_mm_loadu_ps(from));  // GCC 12 compiles the line below to ten instructions
#else
  four = FourDoubles{from[0], from[1], from[2], from[3]};
#endif
}

// Adds up the lanes of each sum in float64, in a fixed order with few dependent additions.
template <class C, int kCount>
SPARSEKERN_INLINE void fold(const SumLanes<C, kCount>& sums, double (&total)[kCount]) {
  C lanes[kCount][kLanes];
  sums.store(lanes[0], kLanes);
  for (int s = 0; s < kCount; ++s) {
    FourDoubles part[4];
    for (int i = 0; i < 4; ++i) widen(lanes[s] + 4 * i, part[i]);
    const FourDoubles all = (part[0] + part[2]) + (part[1] + part[3]);
    total[s] += (all[0] + all[2]) + (all[1] + all[3]);
  }
}

// x - centre and its square; elements from `n` on count as 0.
template <class S>
struct Deviation {
  using C = typename Compute<S>::Type;
  using V = Vectors<C>;
  const S* x;
  typename V::Vector centre;
  int64_t n;

  SPARSEKERN_INLINE void operator()(int64_t i, typename V::Vector (&sum)[2]) const {
    typename V::Vector d = V::load(x + i) - centre;
    if (n < kLanes) d = V::first(d, n - i);
    sum[0] += d;
    sum[1] += d * d;
  }
};

// Updates `count` means and summed squared deviations of `n` numbers each with `m` more numbers, given by their sums
// and sums of squares about `centre` (Chan, Golub and LeVeque 1979). Centring on the mean so far avoids cancellation:
// no sum of squares is much larger than the deviation that results from it.
template <class C, class Sum>
inline void merge_moments(double n, double* __restrict mean, double* __restrict deviation, double m, const C* centre,
                          const Sum* sum, const Sum* sum_sq, int64_t count) {
  const double inverse = 1 / m, share = m / (n + m), between = n * share;
  for (int64_t l = 0; l < count; ++l) {
    const double own = double(sum[l]) * inverse, distance = double(centre[l]) + own - mean[l];
    mean[l] += distance * share;
    deviation[l] += double(sum_sq[l]) - double(sum[l]) * own + distance * distance * between;
  }
}

// Adds x - centre and its square for a run of `n` elements.
template <class S, class Sums>
inline void add_deviations(Sums& sums, const S* x, int64_t n, typename Compute<S>::Type centre) {
  using C = typename Compute<S>::Type;
  const VectorOf<C> same = VectorOf<C>{} + centre;
  const auto terms = [&](const S* from, int64_t count) {
    return Chain<Deviation<S>, kLaneVectors<C>>([=](int) { return Deviation<S>{from, same, count}; });
  };
  int64_t i = 0;
  const auto all = terms(x, kLanes);
  for (; i + kLanes <= n; i += kLanes) sums.add(all, i);
  if (i == n) return;
  S buffer[kLanes] = {};
  __builtin_memcpy(buffer, x + i, static_cast<uint64_t>(n - i) * sizeof(S));
  sums.add(terms(buffer, n - i), 0);
}

// Divides the runs of a channel into parts of at most kNormBlock elements and calls part(first element, elements).
template <class Part>
inline void for_parts(const NormJob& job, const NormPiece& piece, const Part& part) {
  for (int64_t o = piece.outer_begin; o < piece.outer_end; ++o)
    for (int64_t i = 0; i < job.inner; i += kNormBlock)
      part((o * job.channels + piece.channel) * job.inner + i, minimum(kNormBlock, job.inner - i));
}

template <class S>
inline void moments_of_channel(const NormJob& job, const NormPiece& piece) {
  using C = typename Compute<S>::Type;
  using Sums = SumLanes<C, 2>;
  const S* x = static_cast<const S*>(job.x);
  double n = 0, mean = 0, deviation = 0;
  const auto mean_of = [&](const S* from, int64_t count) {
    Sums sums;
    double total[2] = {};
    add_deviations(sums, from, count, C(0));
    fold<C, 2>(sums, total);
    return total[0] / double(count);
  };
  Sums sums;
  int64_t held = 0;
  C centre = C(mean_of(x + piece.channel * job.inner, minimum(kNormBlock, job.inner)));
  const auto merge = [&] {
    double total[2] = {};
    fold<C, 2>(sums, total);
    merge_moments(n, &mean, &deviation, double(held), &centre, &total[0], &total[1], 1);
    n += double(held);
    centre = C(mean);
    sums = Sums{};
    held = 0;
  };
  for_parts(job, piece, [&](int64_t i, int64_t count) {
    add_deviations(sums, x + i, count, centre);
    held += count;
    if (held >= kNormBlock) merge();
  });
  if (held > 0) merge();
  piece.out[kMeanOf * job.channels + piece.channel] = mean;
  piece.out[kDeviation * job.channels + piece.channel] = deviation;
}

// The same sums for each channel of a column over some rows; `sums` has two planes.
template <class S, class C>
inline void sum_deviations(const S* x, int64_t stride, int64_t rows, const C* centre, C* sums) {
  using V = Vectors<C>;
  const Chain<Deviation<S>, kColumn> terms(
      [&](int v) { return Deviation<S>{x, V::load(centre + v * V::kWidth), kLanes}; });
  SumLanesOf<C, 2, kColumn> lanes;
  for (int64_t r = 0; r < rows; ++r) lanes.add(terms, r * stride);
  lanes.store(sums, kColumn * V::kWidth);
}

// Adds a block of `rows` rows to the moments of a column; `before` rows of its piece came before them.
template <class S>
inline void moments_of_column(const NormJob& job, const NormPiece& piece, int64_t before, int64_t rows, int64_t c) {
  using C = typename Compute<S>::Type;
  constexpr int64_t kChannels = kColumn * Vectors<C>::kWidth;
  const S* x = static_cast<const S*>(job.x) + (piece.outer_begin + before) * job.channels + c;
  double* mean = piece.out + kMeanOf * job.channels + c;
  double* deviation = piece.out + kDeviation * job.channels + c;
  C centre[kChannels] = {}, sums[2][kChannels];
  if (before == 0) {
    sum_deviations(x, job.channels, rows, centre, sums[0]);
    for (int64_t l = 0; l < kChannels; ++l) mean[l] = sums[0][l] / double(rows);
  }
  for (int64_t l = 0; l < kChannels; ++l) centre[l] = C(mean[l]);
  sum_deviations(x, job.channels, rows, centre, sums[0]);
  merge_moments(double(before), mean, deviation, double(rows), centre, sums[0], sums[1], kChannels);
}

// The sums of dz, dz * (x - mean) and dz^2, and the number of |dz| above the threshold.
template <class S, class Act>
struct GradTerm {
  using V = typename NormInput<S>::V;
  NormInput<S> input;

  SPARSEKERN_INLINE void operator()(int64_t i, typename V::Vector (&sum)[kNormSums]) const {
    const typename V::Vector x = input.x_at(i), dz = input.template dz_of<Act>(x, i);
    sum[kGradSum] += dz;
    sum[kGradDot] += dz * (x - input.mean);
    sum[kGradSq] += dz * dz;
    sum[kGradCount] += V::exceeds(dz, input.threshold);
  }
};

template <class S, class Act>
inline void grad_sums_of_channel(const NormJob& job, const NormPiece& piece) {
  using Input = NormInput<S>;
  using C = typename Input::C;
  using Terms = Chain<GradTerm<S, Act>, kLaneVectors<C>>;
  // Constructed in place: a copy would read in wide words what was just written in narrow ones, and wait for it.
  const Terms terms([&](int) { return GradTerm<S, Act>{Input(job, piece.channel, 0)}; });
  double total[kNormSums] = {};
  SumLanes<C, kNormSums> sums;
  int64_t held = 0;
  for_parts(job, piece, [&](int64_t begin, int64_t count) {
    const int64_t end = begin + count;
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) sums.add(terms, i);
    if (i < end) {
      typename Input::Buffers buffers;
      sums.add(Terms([&](int) { return GradTerm<S, Act>{terms.first.input.tail(buffers, i, end - i)}; }), 0);
    }
    held += count;
    if (held < kNormBlock) return;
    fold<C, kNormSums>(sums, total);
    sums = SumLanes<C, kNormSums>{};
    held = 0;
  });
  fold<C, kNormSums>(sums, total);
  for (int s = 0; s < kNormSums; ++s) piece.out[s * job.channels + piece.channel] = total[s];
}

template <class S, class Act>
inline void grad_sums_of_column(const NormJob& job, const NormPiece& piece, int64_t row, int64_t rows, int64_t c) {
  using Input = NormInput<S>;
  using C = typename Input::C;
  constexpr int64_t kWidth = Input::V::kWidth, kChannels = kColumn * kWidth;
  const Chain<GradTerm<S, Act>, kColumn> terms(
      [&](int v) { return GradTerm<S, Act>{Input(job, c + v * kWidth, row * job.channels + c)}; });
  SumLanesOf<C, kNormSums, kColumn> lanes;
  for (int64_t r = 0; r < rows; ++r) lanes.add(terms, r * job.channels);
  C sums[kNormSums][kChannels];
  lanes.store(sums[0], kChannels);
  for (int s = 0; s < kNormSums; ++s)
    for (int64_t l = 0; l < kChannels; ++l) piece.out[s * job.channels + c + l] += sums[s][l];
}

template <class S>
inline void norm_moments(const NormJob* job, const NormPiece* piece) {
  if (job->inner > 1) return moments_of_channel<S>(*job, *piece);
  for_columns<S>(*job, *piece, [&](int64_t row, int64_t rows, int64_t c) {
    moments_of_column<S>(*job, *piece, row - piece->outer_begin, rows, c);
  });
}

template <class S, template <class> class Act>
inline void norm_grad_sums(const NormJob* job, const NormPiece* piece) {
  using A = Act<typename Compute<S>::Type>;
  if (job->inner > 1) return grad_sums_of_channel<S, A>(*job, *piece);
  for_columns<S>(*job, *piece,
                 [&](int64_t row, int64_t rows, int64_t c) { grad_sums_of_column<S, A>(*job, *piece, row, rows, c); });
}

SPARSEKERN_END_ISA
