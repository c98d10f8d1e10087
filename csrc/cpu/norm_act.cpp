#include "norm_act.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

namespace sparsekern {

namespace {

// Elements of a piece, and rows that a kernel processes at a time.
constexpr int64_t kPiece = 64 * 1024;
constexpr int64_t kRowsAtOnce = 64;

// Small channels are processed together up to this number of elements, which stay in the first-level cache.
constexpr int64_t kSmallChannels = 4096;

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

int64_t size_of(Dtype dtype) {
  return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
}

// How the data is divided into pieces. It depends on shapes alone, so results are the same for any number of threads.
//
// If the elements of a channel are neighbours, a piece is one channel, so that the second pass finds it in the cache,
// or several small channels: the passes over one channel wait for each other, those over different channels do not.
//
// If not (inner is 1), a piece is a block of rows, each of which repeats all channels until it fills whole vectors. The
// elements left over at the end, too few for such a row, are a piece of their own.
struct Division {
  bool by_channel;
  int64_t copies, width, rows, left_over, rows_of_piece, channels_of_piece, pieces;

  explicit Division(const NormCall& call) {
    by_channel = call.inner > 1;
    copies = by_channel ? 1 : kNormWidth / std::gcd(call.channels, kNormWidth);
    width = call.channels * copies;
    rows = by_channel ? call.outer : call.outer / copies;
    left_over = by_channel ? 0 : (call.outer - rows * copies) * call.channels;
    rows_of_piece = std::max<int64_t>(1, kPiece / (kRowsAtOnce * width)) * kRowsAtOnce;
    channels_of_piece = std::max<int64_t>(1, kSmallChannels / (call.outer * call.inner));
    pieces =
        by_channel ? divide_up(call.channels, channels_of_piece) : divide_up(rows, rows_of_piece) + (left_over > 0);
  }

  int64_t partials() const { return by_channel ? 1 : pieces; }
  bool is_left_over(int64_t piece) const { return left_over > 0 && piece == pieces - 1; }

  // Number of rows of a piece that have an element at position `i`.
  int64_t rows_with(int64_t piece, int64_t i) const {
    if (is_left_over(piece)) return i < left_over;
    return std::min(rows - piece * rows_of_piece, rows_of_piece);
  }
};

// Merges the mean and the summed squared deviations of `m` numbers into those of `n` (Chan, Golub and LeVeque 1979).
void merge_moments(double& n, double& mean, double& deviation, double m, double other_mean, double other_deviation) {
  const double distance = other_mean - mean;
  mean += distance * (m / (n + m));
  deviation += other_deviation + distance * distance * (n * m / (n + m));
  n += m;
}

// Copies of the last elements of the data, which do not fill a whole row, in rows padded with zeros.
class LeftOver {
 public:
  LeftOver(const NormJob& whole, const Division& division, int64_t size)
      : job(whole), bytes_(static_cast<size_t>(division.left_over * size)), memory_(kArrays * division.width * size) {
    const int64_t begin = division.rows * division.width * size, row = division.width * size;
    const auto take = [&](int array, const void*& data) {
      if (data == nullptr) return;
      std::memcpy(&memory_[array * row], static_cast<const char*>(data) + begin, bytes_);
      data = &memory_[array * row];
    };
    take(0, job.x);
    take(1, job.residual);
    take(2, job.grad);
    const auto make = [&](int array, void*& data) {
      targets_[array - kInputs] = data ? static_cast<char*>(data) + begin : nullptr;
      if (data != nullptr) data = &memory_[array * row];
    };
    make(3, job.y);
    make(4, job.grad_x);
    make(5, job.grad_residual);
  }

  // Copies the results back to the tensors.
  void write_back() const {
    const void* const made[] = {job.y, job.grad_x, job.grad_residual};
    for (int i = 0; i < kArrays - kInputs; ++i)
      if (targets_[i] != nullptr) std::memcpy(targets_[i], made[i], bytes_);
  }

  NormJob job;

 private:
  static constexpr int kInputs = 3, kArrays = 6;
  size_t bytes_;
  std::vector<char> memory_;
  char* targets_[kArrays - kInputs];
};

// One call on data with compute type C.
template <class C>
class Norm {
 public:
  using Bits = std::conditional_t<std::is_same_v<C, double>, int64_t, int32_t>;

  Norm(const NormCall& call, const Kernels& kernels, ParallelFor parallel, int64_t threads)
      : call_(call),
        division_(call),
        kernels_(*kernels.norm[call.dtype]),
        parallel_(parallel),
        threads_(std::min(threads, std::max<int64_t>(1, int64_t(elements()) * call.channels / kPiece))),
        numbers_(static_cast<size_t>(kNumbers * division_.width)),
        live_(static_cast<size_t>(division_.width), Bits(-1)) {
    job_.outer = division_.rows;
    job_.channels = division_.width;
    job_.inner = call.inner;
    job_.x = call.x;
    job_.residual = call.residual;
    job_.scale = number(kScale);
    job_.shift = number(kShift);
    job_.mean = number(kMean);
    job_.slope = number(kSlope);
    job_.offset = number(kOffset);
    job_.threshold = number(kThreshold);
    job_.live = live_.data();
  }

  Error forward(const NormForward& to) {
    job_.y = to.y;
    C *mean = static_cast<C*>(to.mean), *var = static_cast<C*>(to.var);
    for (int64_t c = 0; c < call_.channels; ++c) {
      mean[c] = at(to.running_mean, c, 0);
      var[c] = at(to.running_var, c, 1);
      // The factor n / (n - 1) of the update of the running variance cancels this one.
      if (call_.training && masked(c)) var[c] = C(var[c] * (1 - 1.0 / double(elements())));
    }
    std::vector<double> moments(static_cast<size_t>(kMoments * division_.partials() * division_.width));
    const auto finish_channel = [&](int64_t c) {
      if (call_.training && !masked(c)) {
        take_moments(moments.data(), c, mean[c], var[c]);
        if (to.momentum != 0) track(to, c, mean[c], var[c]);
      }
      set_scale(c, mean[c], var[c]);
    };
    const auto moments_of = [&](const NormJob& job, const NormPiece& piece) { kernels_.moments(&job, &piece); };
    const auto forward_of = [&](const NormJob& job, const NormPiece& piece) {
      kernels_.forward[call_.activation](&job, &piece);
    };
    const auto fill = [&](const NormPiece& piece) {
      if (call_.residual == nullptr) return clear(to.y, piece.channel);
      const NormJob job = of_residual(piece.channel, to.y, nullptr);
      kernels_.forward[call_.activation](&job, &piece);
    };
    if (!call_.training)
      return run(moments.data(), 0, [](const NormJob&, const NormPiece&) {}, finish_channel, forward_of, fill);
    return run(moments.data(), kMoments, moments_of, finish_channel, forward_of, fill);
  }

  Error backward(const NormBackward& to) {
    job_.grad = to.grad;
    job_.grad_x = to.grad_x;
    job_.grad_residual = to.grad_residual;
    job_.centred = call_.training;
    for (int64_t c = 0; c < call_.channels; ++c) {
      set_scale(c, at(to.mean, c, 0), at(to.var, c, 1));
      set(kThreshold, c, to.threshold ? C(to.threshold[c]) : C(INFINITY));
    }
    std::vector<double> sums(static_cast<size_t>(kNormSums * division_.partials() * division_.width));
    std::vector<double> total(static_cast<size_t>(kNormSums * call_.channels));
    const auto finish_channel = [&](int64_t c) {
      if (masked(c)) return;
      double* of_channel = total.data() + c * kNormSums;
      take_sums(sums.data(), c, of_channel);
      finish_gradient(to, c, of_channel);
    };
    const auto sums_of = [&](const NormJob& job, const NormPiece& piece) {
      kernels_.sums[call_.activation](&job, &piece);
    };
    const auto backward_of = [&](const NormJob& job, const NormPiece& piece) {
      kernels_.backward[call_.activation](&job, &piece);
    };
    const auto fill = [&](const NormPiece& piece) {
      clear(to.grad_x, piece.channel);
      if (call_.residual == nullptr) return;
      const NormJob job = of_residual(piece.channel, nullptr, to.grad_residual);
      kernels_.backward[call_.activation](&job, &piece);
    };
    for (int64_t c = 0; c < call_.channels; ++c)
      static_cast<C*>(to.grad_weight)[c] = static_cast<C*>(to.grad_bias)[c] = 0;
    const Error error = run(sums.data(), kNormSums, sums_of, finish_channel, backward_of, fill);
    if (error == kOk && to.threshold != nullptr) count(to, total);
    return error;
  }

 private:
  enum Number { kScale, kShift, kMean, kSlope, kOffset, kThreshold, kNumbers };

  bool masked(int64_t c) const { return call_.mask != nullptr && call_.mask[c] != 0; }
  double elements() const { return double(call_.outer * call_.inner); }
  static C at(const void* vector, int64_t c, C none) { return vector ? static_cast<const C*>(vector)[c] : none; }
  C* number(Number which) { return numbers_.data() + which * division_.width; }

  void set(Number which, int64_t c, C value) {
    for (int64_t copy = 0; copy < division_.copies; ++copy) number(which)[copy * call_.channels + c] = value;
  }

  void set_scale(int64_t c, C mean, C var) {
    const bool is_masked = masked(c);
    const double scale = scale_of(c, var);
    set(kScale, c, is_masked ? C(0) : C(scale));
    set(kShift, c, is_masked ? C(0) : C(double(at(call_.bias, c, 0)) - double(mean) * scale));
    set(kMean, c, mean);
    if (is_masked)
      for (int64_t copy = 0; copy < division_.copies; ++copy) live_[copy * call_.channels + c] = 0;
  }

  double scale_of(int64_t c, C var) const {
    return double(at(call_.weight, c, 1)) * (1 / std::sqrt(double(var) + call_.eps));
  }

  // Calls sum(job, piece), then finish_channel(c) for each channel, which uses the sums, then pass(job, piece). A
  // masked channel gets fill(piece) instead of pass.
  template <class Sum, class Finish, class Pass, class Fill>
  Error run(double* partials, int64_t planes, const Sum& sum, const Finish& finish_channel, const Pass& pass,
            const Fill& fill) {
    return (division_.by_channel ? run_by_channel(partials, sum, finish_channel, pass, fill)
                                 : run_by_rows(partials, planes, sum, finish_channel, pass))
               ? kOk
               : kParallelFailed;
  }

  template <class Sum, class Finish, class Pass, class Fill>
  bool run_by_channel(double* partials, const Sum& sum, const Finish& finish_channel, const Pass& pass,
                      const Fill& fill) {
    return parallel_for(parallel_, threads_, division_.pieces, [&](int64_t i) {
      const int64_t begin = i * division_.channels_of_piece;
      const int64_t end = std::min(call_.channels, begin + division_.channels_of_piece);
      const auto piece = [&](int64_t c) { return NormPiece{0, division_.rows, c, partials}; };
      for (int64_t c = begin; c < end; ++c)
        if (!masked(c)) sum(job_, piece(c));
      for (int64_t c = begin; c < end; ++c) finish_channel(c);
      for (int64_t c = begin; c < end; ++c) masked(c) ? fill(piece(c)) : pass(job_, piece(c));
    });
  }

  template <class Sum, class Finish, class Pass>
  bool run_by_rows(double* partials, int64_t planes, const Sum& sum, const Finish& finish_channel, const Pass& pass) {
    const LeftOver left_over(job_, division_, size_of(call_.dtype));
    const auto all = [&](const auto& work) {
      return parallel_for(parallel_, threads_, division_.pieces, [&](int64_t i) {
        const bool left = division_.is_left_over(i);
        const int64_t begin = left ? 0 : i * division_.rows_of_piece;
        const int64_t end = left ? 1 : std::min(division_.rows, begin + division_.rows_of_piece);
        work(left ? left_over.job : job_, NormPiece{begin, end, 0, partials + i * planes * division_.width});
      });
    };
    if (planes > 0 && !all(sum)) return false;
    for (int64_t c = 0; c < call_.channels; ++c) finish_channel(c);
    if (!all(pass)) return false;
    if (division_.left_over > 0) left_over.write_back();
    return true;
  }

  // Updates the running statistics with this batch by torch's lerp; the variance is the unbiased one.
  void track(const NormForward& to, int64_t c, C mean, C var) const {
    const C weight = C(to.momentum), unbiased = var * C(elements() / (elements() - 1));
    const auto blend = [&](void* running, C value) {
      C& own = static_cast<C*>(running)[c];
      own = weight < C(0.5) ? own + weight * (value - own) : value - (value - own) * (1 - weight);
    };
    blend(to.running_mean, mean);
    blend(to.running_var, unbiased);
  }

  // Mean and biased variance of a channel, merged from all pieces.
  void take_moments(const double* moments, int64_t c, C& mean_out, C& var_out) const {
    double n = 0, mean = 0, deviation = 0;
    for (int64_t p = 0; p < division_.partials(); ++p) {
      const double* of_piece = moments + p * kMoments * division_.width;
      for (int64_t i = c; i < division_.width; i += call_.channels) {
        const double m = division_.by_channel ? elements() : double(division_.rows_with(p, i));
        if (m > 0)
          merge_moments(n, mean, deviation, m, of_piece[kMeanOf * division_.width + i],
                        of_piece[kDeviation * division_.width + i]);
      }
    }
    mean_out = C(mean);
    var_out = C(deviation / n);
  }

  void take_sums(const double* sums, int64_t c, double* total) const {
    for (int64_t p = 0; p < division_.partials(); ++p)
      for (int s = 0; s < kNormSums; ++s)
        for (int64_t i = c; i < division_.width; i += call_.channels)
          total[s] += sums[(p * kNormSums + s) * division_.width + i];
  }

  // Stores the gradients of gamma and beta, and the numbers that the gradient of x takes from the sums.
  void finish_gradient(const NormBackward& to, int64_t c, const double* total) {
    const C var = at(to.var, c, 1);
    const double spread = double(var) + call_.eps, scale = scale_of(c, var);
    static_cast<C*>(to.grad_weight)[c] = C(total[kGradDot] / std::sqrt(spread));
    static_cast<C*>(to.grad_bias)[c] = C(total[kGradSum]);
    set(kSlope, c, C(-scale * (total[kGradDot] / elements()) / spread));
    set(kOffset, c, C(-scale * (total[kGradSum] / elements())));
  }

  // A job for a masked channel, whose z is the residual: the residual takes the place of x.
  NormJob of_residual(int64_t c, void* y, void* grad) {
    set(kScale, c, 1);
    live_[c] = -1;
    NormJob job = job_;
    job.x = job.residual;
    job.residual = nullptr;
    job.y = y;
    job.grad_x = grad;
    job.grad_residual = nullptr;
    job.centred = 0;
    return job;
  }

  void clear(void* data, int64_t c) const {
    const int64_t size = size_of(call_.dtype), run = call_.inner * size;
    for (int64_t o = 0; o < call_.outer; ++o)
      std::memset(static_cast<char*>(data) + (o * call_.channels + c) * run, 0, static_cast<size_t>(run));
  }

  // Updates the mean activities with the counts of this pass and sets the thresholds of the next one.
  void count(const NormBackward& to, const std::vector<double>& total) const {
    const float keep = float(to.decay), one_minus_decay = float(1 - to.decay);
    const auto norm_sq = [&](int64_t c) {
      const double gamma = at(call_.weight, c, 1), beta = at(call_.bias, c, 0);
      return gamma * gamma + beta * beta;
    };
    const auto counted = [&](int64_t c) {
      return !masked(c) && std::isfinite(total[c * kNormSums + kGradSq]) && std::isfinite(norm_sq(c));
    };
    double sum = 0, channels = 0;
    for (int64_t c = 0; c < call_.channels; ++c) {
      if (!counted(c)) continue;
      sum += total[c * kNormSums + kGradSq] * norm_sq(c);
      ++channels;
    }
    const double rms = std::sqrt(sum / (channels * elements()));
    for (int64_t c = 0; c < call_.channels; ++c) {
      if (!counted(c)) continue;
      const float share = float(total[c * kNormSums + kGradCount] / elements());
      to.activity[c] = to.activity[c] * keep + share * one_minus_decay;
      to.threshold[c] = norm_sq(c) == 0 ? INFINITY : float(to.tau * rms / std::sqrt(norm_sq(c)));
    }
    *to.updates += 1;
  }

  const NormCall& call_;
  const Division division_;
  const NormKernels& kernels_;
  const ParallelFor parallel_;
  const int64_t threads_;
  std::vector<C> numbers_;
  std::vector<Bits> live_;
  NormJob job_ = {};
};

template <class To, class Member>
Error dispatch(const NormCall& call, const Kernels& kernels, ParallelFor parallel, int64_t threads, const To& to,
               const Member& member) {
  if (call.dtype == kFloat64) return member(Norm<double>(call, kernels, parallel, threads), to);
  return member(Norm<float>(call, kernels, parallel, threads), to);
}

}  // namespace

Error norm_act_forward(const NormCall& call, const NormForward& to, const Kernels& kernels, ParallelFor parallel,
                       int64_t threads) {
  return dispatch(call, kernels, parallel, threads, to, [](auto&& norm, const auto& to) { return norm.forward(to); });
}

Error norm_act_backward(const NormCall& call, const NormBackward& to, const Kernels& kernels, ParallelFor parallel,
                        int64_t threads) {
  return dispatch(call, kernels, parallel, threads, to, [](auto&& norm, const auto& to) { return norm.backward(to); });
}

}  // namespace sparsekern
