// What a row asks of the update of its elements.

template <class C>
struct Factors {
  C decay, decline;

  bool operator==(const Factors& other) const { return decay == other.decay && decline == other.decline; }
};

// AdamW and the mask multiply the weight by `decay`; SGD and Adam add `decay` times the weight to the gradient.
template <class C>
inline C decay_of(const Hyper& hyper, double penalty) {
  const double rate = hyper.weight_decay + penalty, factor = 1 - hyper.lr * rate;
  return C(hyper.decoupled ? factor : rate);
}

template <class C>
inline C decline_of(const Job& job, int32_t countdown) {
  const C declining = (C(countdown) - 1) / C(countdown);
  const C living = countdown > 0 && job.decline ? declining : C(1);
  return countdown == 0 ? C(kMasked) : living;
}

template <class C>
inline Factors<C> factors_of(const Job& job, const Shape& shape, int64_t row) {
  if (shape.start < 0) return {decay_of<C>(job.hyper, 0), C(1)};
  const int64_t r = shape.start + row;
  return {decay_of<C>(job.hyper, job.rows.penalty[r]), decline_of<C>(job, job.rows.countdown[r])};
}

// What the rows of a tile ask for, taken together.
enum Wish { kNothing, kSame, kDifferent };

// Elements that `spread` writes at least.
constexpr int64_t kSpread = 32;

// The value of each row in each of its `width` columns. Short rows write on behind their end, into what the next one
// writes afterwards: a loop of fixed length is a store or two.
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

// Rows that memory is asked for in advance, at most (turns.inc.h).
constexpr int64_t kMostRowsAhead = 192;

// Factors of a tile of rows, and then of its columns.
template <class C>
struct ColumnFactors {
  C decay[kTile + kSpread], decline[kTile + kSpread];
  int32_t live[kTile + kMostRowsAhead];
  bool some_end;

  Wish of_rows(const Job& job, const Shape& shape, int64_t row, int64_t rows) {
    const float* __restrict penalty = job.rows.penalty + shape.start + row;
    const int32_t* __restrict countdown = job.rows.countdown + shape.start + row;
    int32_t differ = 0, any = 0, all = -1;
    for (int64_t r = 0; r < rows; ++r) {
      differ |= penalty[r] != penalty[0];
      any |= countdown[r];
      all &= countdown[r];
    }
    if (any == 0) return kNothing;
    decay[0] = decay_of<C>(job.hyper, penalty[0]);
    some_end = false;
    // Negative in all of them: no row is masked or declines.
    if (!differ && all < 0) return kSame;
    const Hyper hyper = job.hyper;
    for (int64_t r = 0; r < rows; ++r) decay[r] = decay_of<C>(hyper, penalty[r]);
    for (int64_t r = 0; r < rows; ++r) decline[r] = decline_of<C>(job, countdown[r]);
    int32_t ending = 0;
    for (int64_t r = 0; r < rows; ++r) ending |= decline[r] == 0;
    some_end = ending;
    return kDifferent;
  }

  // The same for all of them.
  void repeat(int64_t rows) {
    const C first = decay[0];
    for (int64_t r = 0; r < rows; ++r) decay[r] = first;
    for (int64_t r = 0; r < rows; ++r) decline[r] = 1;
  }

  // The numbers of the rows that are not masked, and after them `more` of those behind the tile. Without a branch:
  // masks lie at random, and a wrong guess takes as long as a short row.
  int64_t number_live(int64_t rows, int64_t more) {
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      live[count] = int32_t(r);
      count += decline[r] >= 0;
    }
    for (int64_t m = 0; m < more; ++m) live[count + m] = int32_t(rows + m);
    return count;
  }

  void widen(int64_t rows, int64_t width) {
    if (width == 1) return;
    widen(decay, rows, width);
    widen(decline, rows, width);
  }

 private:
  static void widen(C* values, int64_t rows, int64_t width) {
    C copy[kTile];
    __builtin_memcpy(copy, values, rows * sizeof(C));
    spread(values, copy, rows, width);
  }
};
