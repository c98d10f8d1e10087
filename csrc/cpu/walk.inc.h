// How a chunk of a tensor is walked: statistics of a block first, then its update while it is in the cache.

// Shortest row that is summed in lanes and updated with constants; shorter ones go column by column.
constexpr int64_t kLongRow = 32;

template <class S, class Update>
class Walk {
 public:
  using C = typename Compute<S>::Type;

  Walk(const Job& job, const Chunk& chunk)
      : job_(job),
        chunk_(chunk),
        shape_(job.shapes[chunk.tensor]),
        pieces_(job.pieces[chunk.tensor]),
        update_(job, chunk.tensor),
        weight_(static_cast<const S*>(job.addresses[kParam][chunk.tensor])),
        grad_(static_cast<S*>(job.addresses[kGrad][chunk.tensor])),
        statistics_(job.statistics && shape_.start >= 0),
        as_it_is_(!job.hyper.scaled && !job.hyper.maximize) {}

  void run() {
    if (shape_.start < 0) {
      untracked();
    } else if (shape_.outer == 1 && shape_.inner >= kLongRow) {
      long_rows();
    } else {
      columns();
    }
  }

 private:
  // The gradient of n elements in the compute type, unscaled and with the sign that is descended. Read from
  // where it lies if nothing has to be done to it, else put into `buffer`.
  const C* gradient(int64_t at, int64_t n, C* buffer, const C* decline = nullptr) {
    if constexpr (!Update::kReadsGrad) return nullptr;
    if constexpr (__is_same(S, C)) {
      if (as_it_is_) return grad_ + at;
    }
    S* __restrict stored = grad_ + at;
    C* __restrict out = buffer;
    if (job_.hyper.scaled) {
      const C scale = C(job_.hyper.grad_scale);
      for (int64_t i = 0; i < n; ++i) out[i] = widen(stored[i]) / scale;
      for (int64_t i = 0; i < n; ++i)
        if (!decline || decline[i] >= 0) narrow(out[i], &stored[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] = widen(stored[i]);
    }
    if (job_.hyper.maximize)
      for (int64_t i = 0; i < n; ++i) out[i] = -out[i];
    return out;
  }

  float* sums_of(int64_t row) const {
    if (pieces_.count == 1) return job_.rows.sums + (shape_.start + row) * kSums;
    return job_.partials + (pieces_.offset + chunk_.piece * shape_.rows + row) * kSums;
  }

  void untracked() {
    const Factors<C> factors = factors_of<C>(job_, shape_, 0);
    C buffer[kBlock];
    const int64_t step = __is_same(S, C) && as_it_is_ ? chunk_.inner_end : kBlock;
    for (int64_t at = chunk_.inner_begin; at < chunk_.inner_end; at += step) {
      const int64_t n = least(step, chunk_.inner_end - at);
      update_.update(at, n, gradient(at, n, buffer), Same<C>{factors.decay}, SameDecline<C>{factors.decline});
    }
  }

  // Rows that lie in one piece. Updates run over neighbouring rows that ask for the same.
  void long_rows() {
    C buffer[2 * kBlock];
    Run run = {0, 0, {}, nullptr};
    for (int64_t row = chunk_.row_begin; row < chunk_.row_end; ++row) {
      const int64_t begin = row * shape_.inner + chunk_.inner_begin;
      const int64_t end = row * shape_.inner + chunk_.inner_end;
      const Factors<C> factors = factors_of<C>(job_, shape_, row);
      if (!(factors == run.factors)) {
        finish(run, begin);
        run.factors = factors;
      }
      if (factors.decline == C(kMasked)) {
        update_.masked(begin, end - begin);
        run.begin = run.end = end;
        continue;
      }
      Lanes<C> sums = {};
      const C threshold = statistics_ ? C(job_.rows.threshold[shape_.start + row]) : C(0);
      for (int64_t at = begin; at < end; at += kBlock) {
        const int64_t n = least(kBlock, end - at);
        const C* d = gradient(at, n, buffer + (at - run.begin));
        if (run.begin == run.end) run.grad = d;
        run.end = at + n;
        if (statistics_) add_row(sums, weight_ + at, d, n, threshold);
        if (run.end - run.begin >= kBlock) finish(run, run.end);
      }
      if (statistics_) store_row(sums, sums_of(row));
    }
    finish(run, 0);
  }

  struct Run {
    int64_t begin, end;
    Factors<C> factors;
    const C* grad;
  };

  void finish(Run& run, int64_t next) {
    const int64_t n = run.end - run.begin;
    if (n > 0) {
      if (run.factors.decline == 0) {
        update_.end(run.begin, n);
      } else {
        update_.update(run.begin, n, run.grad, Same<C>{run.factors.decay}, SameDecline<C>{run.factors.decline});
      }
    }
    run.begin = run.end = next;
  }

  // Rows that are short, or whose elements lie scattered: blocks of neighbouring columns of the [rows, inner]
  // plane, through all of the chunk's outer indices.
  void columns() {
    const int64_t width = chunk_.inner_end - chunk_.inner_begin;
    const int64_t rows_a_block = width > kBlock ? 1 : kBlock / width;
    for (int64_t row = chunk_.row_begin; row < chunk_.row_end; row += rows_a_block) {
      const int64_t rows = least(rows_a_block, chunk_.row_end - row);
      if (spread(row, rows, width)) column_block(row, rows, width);
    }
  }

  // Factors and thresholds per column. False when all rows are masked: nothing to do.
  bool spread(int64_t row, int64_t rows, int64_t width) {
    const Factors<C> first = factors_of<C>(job_, shape_, row);
    plain_ = first.decline > 0;
    bool any = false;
    for (int64_t r = 0; r < rows; ++r) {
      const Factors<C> factors = factors_of<C>(job_, shape_, row + r);
      plain_ = plain_ && factors == first;
      any = any || factors.decline >= 0;
      const C threshold = statistics_ ? C(job_.rows.threshold[shape_.start + row + r]) : C(0);
      for (int64_t i = r * width; i < (r + 1) * width; ++i) {
        decay_[i] = factors.decay;
        decline_[i] = factors.decline;
        threshold_[i] = threshold;
      }
    }
    if (!any)
      for (int64_t o = chunk_.outer_begin; o < chunk_.outer_end; ++o)
        update_.masked((o * shape_.rows + row) * shape_.inner + chunk_.inner_begin, rows * width);
    return any;
  }

  void column_block(int64_t row, int64_t rows, int64_t width) {
    const int64_t n = rows * width;
    C buffer[kBlock];
    Columns<C> sums;
    for (int64_t o = chunk_.outer_begin; o < chunk_.outer_end; ++o) {
      const int64_t at = (o * shape_.rows + row) * shape_.inner + chunk_.inner_begin;
      const C* d = gradient(at, n, buffer, decline_);
      if (statistics_) {
        if (o == chunk_.outer_begin) {
          add_columns<false>(sums, weight_ + at, d, n, threshold_);
        } else {
          add_columns<true>(sums, weight_ + at, d, n, threshold_);
        }
      }
      if (plain_) {
        update_.update(at, n, d, Same<C>{decay_[0]}, SameDecline<C>{decline_[0]});
      } else {
        update_.update(at, n, d, decay_, EachDecline<C>{decline_});
      }
    }
    if (statistics_) store_columns(sums, rows, width, sums_of(row));
  }

  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

  const Job& job_;
  const Chunk& chunk_;
  const Shape& shape_;
  const Pieces& pieces_;
  Update update_;
  const S* weight_;
  S* grad_;
  bool statistics_, as_it_is_;
  bool plain_;
  C decay_[kBlock], decline_[kBlock], threshold_[kBlock];
};
