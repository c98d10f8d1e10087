// The factors of a row in the update of its elements, computed from its penalty, countdown and mask.
#pragma once

#include "../../abi.h"
#include "row_sums.h"
#include "values.h"

SPARSEKERN_BEGIN_ISA

template <class C>
struct Factors {
  C decay, fade;

  bool operator==(const Factors& other) const { return decay == other.decay && fade == other.fade; }
};

// AdamW and the mask multiply the weight by `decay`; SGD and Adam add `decay` times the weight to the gradient.
template <class C>
inline C decay_of(const Hyper& hyper, double penalty) {
  const double rate = hyper.weight_decay + penalty, factor = 1 - hyper.lr * rate;
  return C(hyper.decoupled ? factor : rate);
}

template <class C>
inline C fade_of(const Job& job, int32_t countdown) {
  const C fading = (C(countdown) - 1) / C(countdown);
  const C living = countdown > 0 && job.fade ? fading : C(1);
  return countdown == 0 ? C(kMasked) : living;
}

template <class C>
inline Factors<C> factors_of(const Job& job, const Shape& shape, int64_t row) {
  if (shape.start < 0) return {decay_of<C>(job.hyper, 0), C(1)};
  const int64_t r = shape.start + row;
  return {decay_of<C>(job.hyper, job.rows.penalty[r]), fade_of<C>(job, job.rows.countdown[r])};
}

// How the factors of the rows of a tile compare.
enum RowMix { kAllMasked, kUniform, kMixed };

// Minimum number of elements that `spread` writes.
constexpr int64_t kSpread = 32;

// Writes the value of each row to its `width` columns. A short row writes past its end, and the next row overwrites
// that: a loop of fixed length compiles to one or two stores.
template <class C, class T>
inline void spread(C* __restrict out, const T* __restrict values, int64_t rows, int64_t width) {
  if (width == 1) {
    for (int64_t r = 0; r < rows; ++r) out[r] = C(values[r]);
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t n = width <= kSpread ? kSpread : width;
    const C value = C(values[r]);
    if (n == kSpread) {
      for (int64_t i = 0; i < kSpread; ++i) out[r * width + i] = value;
    } else {
      for (int64_t i = 0; i < n; ++i) out[r * width + i] = value;
    }
  }
}

// Maximum number of rows that fused_update.h prefetches ahead.
constexpr int64_t kMaxRowsAhead = 192;

// The factors of a tile: first one for each row, and after widen() one for each column.
template <class C>
struct ColumnFactors {
  C decay[kTile + kSpread], fade[kTile + kSpread];
  int32_t live[kTile + kMaxRowsAhead];
  bool any_ends;

  RowMix of_rows(const Job& job, const Shape& shape, int64_t row, int64_t rows) {
    const float* __restrict penalty = job.rows.penalty + shape.start + row;
    const int32_t* __restrict countdown = job.rows.countdown + shape.start + row;
    int32_t differ = 0, any = 0, all = -1;
    for (int64_t r = 0; r < rows; ++r) {
      differ |= penalty[r] != penalty[0];
      any |= countdown[r];
      all &= countdown[r];
    }
    if (any == 0) return kAllMasked;
    decay[0] = decay_of<C>(job.hyper, penalty[0]);
    any_ends = false;
    // All countdowns are negative: no row is masked or fading.
    if (!differ && all < 0) return kUniform;
    const Hyper hyper = job.hyper;
    for (int64_t r = 0; r < rows; ++r) decay[r] = decay_of<C>(hyper, penalty[r]);
    for (int64_t r = 0; r < rows; ++r) fade[r] = fade_of<C>(job, countdown[r]);
    int32_t ending = 0;
    for (int64_t r = 0; r < rows; ++r) ending |= fade[r] == 0;
    any_ends = ending;
    return kMixed;
  }

  // Copies the factors of the first row to all rows.
  void repeat(int64_t rows) {
    const C first = decay[0];
    for (int64_t r = 0; r < rows; ++r) decay[r] = first;
    for (int64_t r = 0; r < rows; ++r) fade[r] = 1;
  }

  // Lists the rows that are not masked, then `more` indices behind the tile for the prefetch; returns the number of
  // rows. The loop has no branch: masks are random, and a mispredicted branch costs as much as a short row.
  int64_t list_live(int64_t rows, int64_t more) {
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      live[count] = int32_t(r);
      count += fade[r] >= 0;
    }
    for (int64_t m = 0; m < more; ++m) live[count + m] = int32_t(rows + m);
    return count;
  }

  void widen(int64_t rows, int64_t width) {
    if (width == 1) return;
    widen(decay, rows, width);
    widen(fade, rows, width);
  }

 private:
  static void widen(C* values, int64_t rows, int64_t width) {
    C copy[kTile];
    __builtin_memcpy(copy, values, rows * sizeof(C));
    spread(values, copy, rows, width);
  }
};

SPARSEKERN_END_ISA
