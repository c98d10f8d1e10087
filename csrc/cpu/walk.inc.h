// How a chunk of a tensor is walked: statistics of a block first, then its update while it is in the cache.

// Shortest row that is summed in lanes; shorter ones go column by column.
constexpr int64_t kLongRow = 8;

// Shortest row that is updated by itself. Shorter ones are updated together with their neighbours.
constexpr int64_t kWideRow = 64;

// Shortest row with a loop of its own; shorter ones go one after the other through one loop, where registers allow it.
constexpr int64_t kOwnLoopRow = 256;

// Elements to ask for in advance where masked rows are left out: what is worked on while memory answers.
constexpr int64_t kGap = 1024;

constexpr uintptr_t kPage = 4096;

// What the columns of a tile need; the thresholds a quarter of a page away from the sums (Walk::place_tile says why).
template <class C>
struct Tile {
  Columns<C> columns;
  char gap[kPage / 4];
  C threshold[kTile + kSpread];
};

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
      return;
    }
#if defined(__AVX512F__)
    if constexpr (kInTurns<C> && Update::kTakesRows) {
      if (statistics_ && shape_.outer == 1 && shape_.inner >= kLongRow && shape_.inner < kOwnLoopRow && as_it_is_ &&
          update_.spreads())
        return rows_in_one_loop();
    }
#endif
    if (shape_.outer == 1 && shape_.inner >= kWideRow) {
      wide_rows();
    } else {
      tiles();
    }
  }

 private:
  static constexpr int64_t kBufferSize = kBlock + kLanes;

  // The gradient of n elements in the compute type, unscaled and with the sign that is descended. Read from
  // where it lies if nothing has to be done to it, else put into `buffer`.
  const C* gradient(int64_t at, int64_t n, C* buffer, const C* decline) {
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

  // Whether the update takes the gradient from where it lies, in whatever type.
  bool direct() const { return as_it_is_ && (__is_same(S, C) || (kInTurns<C> && update_.fuses())); }

  // Calls work(d) with the gradient of n elements.
  template <class Work>
  SPARSEKERN_INLINE void with_gradient(int64_t at, int64_t n, const C* decline, Work work) {
    if constexpr (Update::kReadsGrad && kInTurns<C> && !__is_same(S, C)) {
      if (direct()) return work(static_cast<const S*>(grad_ + at));
    }
    C buffer[kBufferSize];
    work(gradient(at, n, buffer, decline));
  }

  // Elements to take at once: what a first-level cache holds between statistics and update, or the buffer of the
  // gradient.
  int64_t longest() const { return direct() && update_.fuses() ? INT64_MAX : kBlock; }

  float* sums_of(int64_t row) const {
    if (pieces_.count == 1) return job_.rows.sums + (shape_.start + row) * kSums;
    return job_.partials + (pieces_.offset + chunk_.piece * shape_.rows + row) * kSums;
  }

  C threshold_of(int64_t row) const { return statistics_ ? C(job_.rows.threshold[shape_.start + row]) : C(0); }

  void untracked() {
    const C decay = decay_of<C>(job_.hyper, 0);
    const int64_t step = longest();
    for (int64_t at = chunk_.inner_begin, n; at < chunk_.inner_end; at += n) {
      n = least(step, chunk_.inner_end - at);
      with_gradient(at, n, nullptr, [&](const auto* d) {
        update_.update(at, n, d, Same<C>{decay}, SameDecline<C>{1}, NoStatistics());
      });
    }
  }

  int64_t begin_of(int64_t row) const { return row * shape_.inner + chunk_.inner_begin; }
  int64_t end_of(int64_t row) const { return row * shape_.inner + chunk_.inner_end; }

  // How much of this chunk there is from `at` on; what lies behind may be another thread's.
  int64_t readable_from(int64_t at) const { return end_of(chunk_.row_end - 1) - at; }

#if defined(__AVX512F__)
  // Rows in one piece, one after the other through one loop. Its few registers for each made rows of 9 to 40 elements
  // twice as fast as their statistics one by one before an update of all together.
  void rows_in_one_loop() {
    static_assert(kAheadInTurns<S, 1> <= kMostRowsAhead * kLongRow);
    const int64_t width = chunk_.inner_end - chunk_.inner_begin;
    for (int64_t row = chunk_.row_begin; row < chunk_.row_end; row += kTile) {
      const int64_t rows = least(kTile, chunk_.row_end - row);
      const Wish wish = factors_.of_rows(job_, shape_, row, rows);
      if (wish == kNothing) continue;
      if (wish == kSame) factors_.repeat(rows);
      const int64_t begin = begin_of(row), live = factors_.number_live(rows, rows_ahead<S, 1>(width));
      const float* threshold = job_.rows.threshold + shape_.start + row;
      update_.update_rows(begin, grad_ + begin,
                          {live, width, factors_.live, factors_.decay, factors_.decline, threshold, sums_of(row)});
      if (wish == kDifferent && factors_.some_end) end_rows(begin, rows, width, 1);
    }
  }
#endif

  // Rows that lie in one piece and are long enough to be updated one by one.
  void wide_rows() {
    Ahead ahead = {chunk_.row_begin, some_masked() ? 0 : INT64_MAX};
    for (int64_t row = chunk_.row_begin; row < chunk_.row_end; ++row) {
      const int64_t begin = begin_of(row), n = end_of(row) - begin;
      const Factors<C> factors = factors_of<C>(job_, shape_, row);
      if (factors.decline == C(kMasked)) {
        update_.masked(begin, n);
        continue;
      }
      ahead.elements -= n;
      while (ahead.elements < kGap && ahead.row < chunk_.row_end) look_ahead(ahead);
      if (statistics_) {
        Lanes<C> sums;
        wide_row(begin, n, factors, RowStatistics<C>{&sums, readable_from(begin), {threshold_of(row)}});
        store_row(sums, sums_of(row));
      } else {
        wide_row(begin, n, factors, NoStatistics());
      }
      if (factors.decline == 0) update_.end(begin, n);
    }
  }

  template <class Statistics>
  void wide_row(int64_t begin, int64_t count, const Factors<C>& factors, Statistics statistics) {
    const int64_t step = longest();
    for (int64_t at = begin, n; at < begin + count; at += n) {
      n = least(step, begin + count - at);
      statistics.readable = readable_from(at);
      with_gradient(at, n, nullptr, [&](const auto* d) {
        update_.update(at, n, d, Same<C>{factors.decay}, SameDecline<C>{factors.decline}, statistics);
      });
    }
  }

  // The machine's prefetchers follow memory that is read without gaps. Between masked rows they lose the trail, so the
  // rows to come are asked for here: `elements` of them, up to row `row`. Into the second-level cache, because the
  // first has too few requests under way at a time: it made rows of 160 take half as long again.
  struct Ahead {
    int64_t row, elements;
  };

  void look_ahead(Ahead& ahead) const {
    const int64_t row = ahead.row++;
    if (job_.rows.countdown[shape_.start + row] == 0) return;
    const int64_t begin = begin_of(row), n = end_of(row) - begin;
    prefetch(begin, least(n, kGap));
    ahead.elements += n;
  }

  void prefetch(int64_t begin, int64_t n) const {
    constexpr int64_t kLine = 64 / sizeof(S);
    for (int64_t at = begin; at < begin + n; at += kLine) {
      if (Update::kReadsGrad) prefetch_far(grad_ + at);
      update_.prefetch(at);
    }
  }

  bool some_masked() const {
    const int32_t* countdown = job_.rows.countdown + shape_.start;
    int32_t some = 0;
    for (int64_t row = chunk_.row_begin; row < chunk_.row_end; ++row) some |= countdown[row] == 0;
    return some;
  }

  // Other rows: tiles of neighbouring columns of the [rows, inner] plane, through all of the chunk's outer indices, in
  // the order of memory. Masked rows among others are read and kept: to leave them out would cost more.
  void tiles() {
    place_tile();
    const int64_t width = chunk_.inner_end - chunk_.inner_begin;
    const int64_t widest = sums_by_row() ? kBlock : kTile;
    const int64_t rows_a_tile = width > widest ? 1 : widest / width;
    for (int64_t row = chunk_.row_begin; row < chunk_.row_end; row += rows_a_tile)
      tile(row, least(rows_a_tile, chunk_.row_end - row), width);
  }

  // Short rows in one piece have their sums taken one by one, but are updated together.
  bool sums_by_row() const { return shape_.outer == 1 && shape_.inner >= kLongRow; }

  void tile(int64_t row, int64_t rows, int64_t width) {
    const Wish wish = factors_.of_rows(job_, shape_, row, rows);
    const bool in_columns = statistics_ && !sums_by_row() && wish != kNothing;
    columns_a_value_ = in_columns && in_fours(width) ? 4 : 1;
    if (in_columns) {
      if (!single()) tile_->columns.clear(rows * width, width);
      spread(tile_->threshold, job_.rows.threshold + shape_.start + row, rows, width / columns_a_value_);
    }
    if (wish == kDifferent) factors_.widen(rows, width / columns_a_value_);
    for (int64_t o = chunk_.outer_begin; o < chunk_.outer_end; ++o) {
      const int64_t begin = column_address(o, row);
      if (wish == kNothing) {
        update_.masked(begin, rows * width);
      } else if (sums_by_row()) {
        row_block(row, rows, width, wish == kSame);
      } else {
        column_blocks(begin, row, rows * width, wish == kSame);
      }
      if (wish == kDifferent && factors_.some_end) end_rows(begin, rows, width, width / columns_a_value_);
    }
    if (in_columns && !single()) store_columns(tile_->columns, rows, width, sums_of(row));
  }

  // Whether an element is all that there is of a row.
  bool single() const { return shape_.outer == 1 && shape_.inner == 1; }

  // Whether the loop over a tile of such rows spreads their factors and thresholds itself.
  bool in_fours(int64_t width) const { return width == 4 && update_.spreads() && !job_.hyper.scaled; }

  void row_block(int64_t row, int64_t rows, int64_t width, bool same) {
    const int64_t begin = begin_of(row), n = rows * width;
    with_gradient(begin, n, same ? nullptr : factors_.decline, [&](const auto* d) {
      if (statistics_) look_at_rows(row, rows, width, d, same);
      update_columns<Each<C>>(begin, n, d, 0, same, NoStatistics());
    });
  }

  template <class D>
  void look_at_rows(int64_t row, int64_t rows, int64_t width, const D* d, bool same) {
    const int64_t begin = begin_of(row);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = r * width;
      if (!same && factors_.decline[i] < 0) continue;
      Lanes<C> sums;
      look(width, weight_ + begin + i, d + i,
           RowStatistics<C>{&sums, readable_from(begin + i), {threshold_of(row + r)}});
      store_row(sums, sums_of(row + r));
    }
  }

  // Half a page away from the parameter's place in its page. A load waits for an earlier store that differs in the
  // upper bits of the address alone, and planes of whole pages would keep sums and parameters that close all along.
  void place_tile() {
    const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
    const uintptr_t wanted = address(weight_ + column_address(chunk_.outer_begin, chunk_.row_begin)) + kPage / 2;
    const uintptr_t shift = (wanted - address(tile_memory_)) % kPage / 64 * 64;
    tile_ = reinterpret_cast<Tile<C>*>(tile_memory_ + shift);
  }

  int64_t column_address(int64_t outer, int64_t row) const {
    return (outer * shape_.rows + row) * shape_.inner + chunk_.inner_begin;
  }

  // The columns of a tile at one outer index, the first of them that of `row` at address `begin`.
  void column_blocks(int64_t begin, int64_t row, int64_t columns, bool same) {
    for (int64_t column = 0; column < columns; column += kBlock) {
      const int64_t n = least(kBlock, columns - column), readable = columns - column;
      const C* decline = same ? nullptr : factors_.decline + column;
      with_gradient(begin + column, n, decline,
                    [&](const auto* d) { column_block(begin + column, n, readable, d, row, column, same); });
    }
  }

  template <class D>
  void column_block(int64_t at, int64_t n, int64_t readable, const D* d, int64_t row, int64_t column, bool same) {
    Columns<C>& sums = tile_->columns;
    const C* threshold = tile_->threshold + column / columns_a_value_;
    if (!statistics_) {
      update_columns<Each<C>>(at, n, d, column, same, NoStatistics());
    } else if (single()) {
      using Statistics = SingleStatistics<C>;
      update_columns<Each<C>>(at, n, d, column, same, Statistics{sums_of(row + column), n, readable, {threshold}});
    } else if (kInTurns<C> && columns_a_value_ == 4) {
      using Statistics = QuadStatistics<C, EachFour<C>>;
      update_columns<EachFour<C>>(at, n, d, column, same, Statistics{sums.quad_sums + column, readable, {threshold}});
    } else if (sums.quads) {
      using Statistics = QuadStatistics<C, Each<C>>;
      update_columns<Each<C>>(at, n, d, column, same, Statistics{sums.quad_sums + column, readable, {threshold}});
    } else {
      using Statistics = ColumnStatistics<C>;
      Lanes<C>* lanes = sums.sums + column / kLanes;
      update_columns<Each<C>>(at, n, d, column, same, Statistics{lanes, readable, {threshold}});
    }
  }

  template <class Values, class D, class Statistics>
  void update_columns(int64_t at, int64_t n, const D* d, int64_t column, bool same, Statistics statistics) {
    const int64_t first = column / columns_a_value_;
    if (same) {
      update_.update(at, n, d, Same<C>{factors_.decay[0]}, SameDecline<C>{1}, statistics);
    } else {
      const Declines<C, Values> decline{{factors_.decline + first}};
      update_.update(at, n, d, Values{factors_.decay + first}, decline, statistics);
    }
  }

  // Rows of the tile whose decline ends.
  void end_rows(int64_t begin, int64_t rows, int64_t width, int64_t values) const {
    for (int64_t r = 0; r < rows; ++r)
      if (factors_.decline[r * values] == 0) update_.end(begin + r * width, width);
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
  // Columns that share a number in the arrays of factors and thresholds.
  int64_t columns_a_value_ = 1;
  ColumnFactors<C> factors_;
  Tile<C>* tile_;
  alignas(64) char tile_memory_[sizeof(Tile<C>) + kPage];
};
