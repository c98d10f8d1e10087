// The rows of one tensor after all of its chunks: sums folded, means, next thresholds, countdowns.

constexpr int kRows = 16;

inline bool finite(float x) { return x - x == 0; }

// Partial sums are added in the order of their pieces.
inline void fold_pieces(const Job& job, const Shape& shape, const Pieces& pieces) {
  float* __restrict sums = job.rows.sums + shape.start * kSums;
  for (int64_t p = 0; p < pieces.count; ++p) {
    const float* __restrict part = job.partials + (pieces.offset + p * shape.rows) * kSums;
    for (int64_t i = 0; i < shape.rows * kSums; ++i) sums[i] = p == 0 ? part[i] : sums[i] + part[i];
  }
}

// What is gathered over the rows of a tensor, in lanes.
struct Gathered {
  double product[kRows];  // grad_sq * weight_sq of the rows that count
  int32_t counted[kRows], spoilt[kRows];
};

// Clears the sums of masked and non-finite rows; of the others it updates the mean activity, and it marks their
// thresholds (never negative otherwise) as due.
inline void look_at_rows(const Job& job, int64_t start, int64_t n, float size, Gathered& all) {
  float* __restrict sums = job.rows.sums + start * kSums;
  const int32_t* __restrict countdown = job.rows.countdown + start;
  float* __restrict activity = job.rows.activity + start;
  float* __restrict threshold = job.rows.threshold + start;
  const float keep = float(job.hyper.decay), fresh = float(1 - job.hyper.decay);
  for (int64_t i = 0; i < n; ++i) {
    float* s = sums + i * kSums;
    const bool alive = countdown[i] != 0;
    const bool sound = finite(s[0]) & finite(s[1]) & finite(s[2]) & finite(s[3]);
    const bool counts = alive & sound;
    for (int k = 0; k < kSums; ++k) s[k] = counts ? s[k] : 0.0f;
    all.product[i] += double(s[2]) * double(s[3]);
    all.counted[i] += counts;
    all.spoilt[i] += alive & !sound;
    const float mean = activity[i] * keep + s[0] / size * fresh;
    activity[i] = counts ? mean : activity[i];
    threshold[i] = counts ? -1.0f : threshold[i];
  }
}

inline void set_thresholds(const Job& job, int64_t start, int64_t n, double scaled_rms) {
  const float* __restrict sums = job.rows.sums + start * kSums;
  float* __restrict threshold = job.rows.threshold + start;
  for (int64_t i = 0; i < n; ++i) {
    const double weight_sq = sums[i * kSums + 3];
    const double next = scaled_rms / __builtin_sqrt(weight_sq);
    const float due = weight_sq == 0 ? __builtin_inff() : float(next);
    threshold[i] = threshold[i] < 0 ? due : threshold[i];
  }
}

inline void finish_statistics(const Job& job, const Shape& shape, const Pieces& pieces) {
  if (pieces.count > 1) fold_pieces(job, shape, pieces);
  const int64_t size = shape.outer * shape.inner;
  Gathered all = {};
  for (int64_t r = 0; r < shape.rows; r += kRows) {
    const int64_t n = shape.rows - r < kRows ? shape.rows - r : kRows;
    look_at_rows(job, shape.start + r, n, float(size), all);
  }
  double total = 0;
  int64_t counted = 0, spoilt = 0;
  for (int l = 0; l < kRows; ++l) {
    total += all.product[l];
    counted += all.counted[l];
    spoilt += all.spoilt[l];
  }
  const double rms = __builtin_sqrt(total / (double(counted) * double(size)));
  set_thresholds(job, shape.start, shape.rows, job.hyper.tau * rms);
  if (spoilt) __atomic_fetch_add(job.rows.nonfinite, spoilt, __ATOMIC_RELAXED);
}

void finish(const Job* job, int32_t tensor) {
  const Shape& shape = job->shapes[tensor];
  if (shape.start < 0) return;
  if (job->statistics) finish_statistics(*job, shape, job->pieces[tensor]);
  if (job->decline) {
    int32_t* __restrict countdown = job->rows.countdown + shape.start;
    for (int64_t r = 0; r < shape.rows; ++r) countdown[r] -= countdown[r] > 0;
  }
}
