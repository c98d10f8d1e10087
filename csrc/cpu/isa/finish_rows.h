// What is done for the rows of a tensor after its last chunk: fold partial sums, update means and thresholds, count
// down.
#pragma once

#include "../../abi.h"
#include "row_sums.h"
#include "statistics.h"

SPARSEKERN_BEGIN_ISA

// Adds partial sums in the order of their pieces.
inline void fold_pieces(const Job& job, const Shape& shape, const Pieces& pieces) {
  float* __restrict sums = job.rows.sums + shape.start * kSums;
  for (int64_t p = 0; p < pieces.count; ++p) {
    const float* __restrict part = job.partials + (pieces.offset + p * shape.rows) * kSums;
    for (int64_t i = 0; i < shape.rows * kSums; ++i) sums[i] = p == 0 ? part[i] : sums[i] + part[i];
  }
}

inline int32_t finite(float x) {
  constexpr uint32_t kExponent = 0x7f800000;
  return (__builtin_bit_cast(uint32_t, x) & kExponent) != kExponent;
}

// Rows of a tensor that are counted, and live rows with a sum that is not finite.
struct RowCounts {
  int32_t counted, nonfinite;
};

// Updates the mean activity of the counted rows and marks their thresholds as due with a negative number, which a
// threshold never is. A row is counted if it is not masked and its four sums are finite.
inline RowCounts update_means(const Job& job, const Shape& shape) {
  const float* __restrict sums = job.rows.sums + shape.start * kSums;
  const int32_t* __restrict countdown = job.rows.countdown + shape.start;
  float* __restrict activity = job.rows.activity + shape.start;
  float* __restrict threshold = job.rows.threshold + shape.start;
  const float keep = float(job.hyper.decay), one_minus_decay = float(1 - job.hyper.decay);
  const float size = job.rows.elements[shape.start];
  RowCounts rows = {0, 0};
  for (int64_t r = 0; r < shape.rows; ++r) {
    const float* s = sums + r * kSums;
    const int32_t live = countdown[r] != 0;
    const int32_t is_finite = finite(s[0]) & finite(s[1]) & finite(s[2]) & finite(s[3]);
    const int32_t is_counted = live & is_finite;
    rows.counted += is_counted;
    rows.nonfinite += live & ~is_finite;
    const float old_mean = activity[r], old_threshold = threshold[r];
    const float mean = old_mean * keep + s[0] / size * one_minus_decay;
    activity[r] = is_counted ? mean : old_mean;
    threshold[r] = is_counted ? -1.0f : old_threshold;
  }
  return rows;
}

// Sets the sums of rows that are not counted to 0.
inline void clear_sums(const Job& job, const Shape& shape) {
  float* sums = job.rows.sums + shape.start * kSums;
  const float* threshold = job.rows.threshold + shape.start;
  for (int64_t r = 0; r < shape.rows; ++r)
    if (!(threshold[r] < 0))
      for (int s = 0; s < kSums; ++s) sums[r * kSums + s] = 0;
}

// Root mean square of (gradient element * norm of its row) over the counted rows.
inline double rms_of(const Job& job, const Shape& shape, int32_t counted) {
  const float* __restrict sums = job.rows.sums + shape.start * kSums;
  double lane[kLanes] = {}, product[kBlock];
  for (int64_t begin = 0; begin < shape.rows; begin += kBlock) {
    const float* __restrict block = sums + begin * kSums;
    const int64_t n = shape.rows - begin < kBlock ? shape.rows - begin : kBlock;
    for (int64_t r = 0; r < n; ++r) product[r] = double(block[r * kSums + 2]) * double(block[r * kSums + 3]);
    int64_t r = 0;
    for (; r + kLanes <= n; r += kLanes)
      for (int l = 0; l < kLanes; ++l) lane[l] += product[r + l];
    for (int l = 0; r + l < n; ++l) lane[l] += product[r + l];
  }
  double total = 0;
  for (int l = 0; l < kLanes; ++l) total += lane[l];
  return __builtin_sqrt(total / (double(counted) * double(job.rows.elements[shape.start])));
}

inline void set_thresholds(const Job& job, const Shape& shape, double scaled_rms) {
  const float* __restrict sums = job.rows.sums + shape.start * kSums;
  float* __restrict threshold = job.rows.threshold + shape.start;
  for (int64_t r = 0; r < shape.rows; ++r) {
    const double weight_sq = sums[r * kSums + 3];
    const float next = float(scaled_rms / __builtin_sqrt(weight_sq));
    const float due = weight_sq == 0 ? __builtin_inff() : next;
    const float old = threshold[r];
    threshold[r] = old < 0 ? due : old;
  }
}

inline void finish_statistics(const Job& job, const Shape& shape, const Pieces& pieces) {
  if (pieces.count > 1) fold_pieces(job, shape, pieces);
  const RowCounts rows = update_means(job, shape);
  if (rows.counted < shape.rows) clear_sums(job, shape);
  set_thresholds(job, shape, job.hyper.tau * rms_of(job, shape, rows.counted));
  if (rows.nonfinite) __atomic_fetch_add(job.rows.nonfinite, int64_t(rows.nonfinite), __ATOMIC_RELAXED);
}

void finish(const Job* job, int32_t tensor) {
  const Shape& shape = job->shapes[tensor];
  if (shape.start < 0) return;
  if (job->statistics) finish_statistics(*job, shape, job->pieces[tensor]);
  if (job->fade) {
    int32_t* __restrict countdown = job->rows.countdown + shape.start;
    for (int64_t r = 0; r < shape.rows; ++r) countdown[r] -= countdown[r] > 0;
  }
}

SPARSEKERN_END_ISA
