// The loop for short rows and for rows that are not contiguous (outer > 1). It processes tiles of neighbouring columns
// of the [rows, inner] plane over all outer indices of the chunk, in memory order. Masked rows between others are read
// and written back unchanged, which costs less than skipping them.
#pragma once

#include "chunk_view.h"
#include "fused_update.h"

SPARSEKERN_BEGIN_ISA

constexpr uintptr_t kPage = 4096;

// Sums and thresholds of the columns of a tile, a quarter of a page apart for the reason given at place_tile().
template <class C>
struct Tile {
  Columns<C> columns;
  char gap[kPage / 4];
  C threshold[kTile + kSpread];
};

template <class S, class Update>
class ColumnTiles {
 public:
  using C = typename Compute<S>::Type;

  explicit ColumnTiles(const ChunkView<S, Update>& view) : view_(view) {}

  void run() {
    place_tile();
    const Chunk& chunk = view_.chunk;
    const int64_t width = chunk.inner_end - chunk.inner_begin;
    const int64_t widest = sums_by_row() ? kBlock : kTile;
    const int64_t rows_a_tile = width > widest ? 1 : widest / width;
    for (int64_t row = chunk.row_begin; row < chunk.row_end; row += rows_a_tile)
      tile(row, minimum(rows_a_tile, chunk.row_end - row), width);
  }

 private:
  // Contiguous short rows: the sums are taken row by row, and all rows are updated together.
  bool sums_by_row() const { return view_.shape.outer == 1 && view_.shape.inner >= kLongRow; }

  // Every row is a single element.
  bool single() const { return view_.shape.outer == 1 && view_.shape.inner == 1; }

  // The loop over a tile of rows of four elements expands factors and thresholds itself.
  bool in_fours(int64_t width) const {
    return width == 4 && view_.update.expands_row_values() && view_.gradient.unmodified();
  }

  void tile(int64_t row, int64_t rows, int64_t width) {
    mix_ = factors_.of_rows(view_.job, view_.shape, row, rows);
    const bool in_columns = view_.statistics && !sums_by_row() && mix_ != kAllMasked;
    columns_a_value_ = in_columns && in_fours(width) ? 4 : 1;
    if (in_columns) {
      if (!single()) tile_->columns.clear(rows * width, width);
      const float* threshold = view_.job.rows.threshold + view_.shape.start + row;
      spread(tile_->threshold, threshold, rows, width / columns_a_value_);
    }
    if (mix_ == kMixed) factors_.widen(rows, width / columns_a_value_);
    for (int64_t o = view_.chunk.outer_begin; o < view_.chunk.outer_end; ++o) {
      const int64_t begin = column_address(o, row);
      if (mix_ == kAllMasked) {
        view_.update.masked(begin, rows * width);
      } else if (sums_by_row()) {
        row_block(row, rows, width);
      } else {
        column_blocks(begin, row, rows * width);
      }
      if (mix_ == kMixed && factors_.any_ends)
        view_.end_rows(factors_.fade, begin, rows, width, width / columns_a_value_);
    }
    if (in_columns && !single()) store_columns(tile_->columns, rows, width, view_.sums_of(row));
  }

  // The fades of the columns from `column` on; null if there are none.
  const C* fades_from(int64_t column) const { return mix_ == kMixed ? factors_.fade + column : nullptr; }

  void row_block(int64_t row, int64_t rows, int64_t width) {
    const int64_t begin = view_.begin_of(row), n = rows * width;
    view_.gradient.template with_gradient<kTakesStored<S>>(begin, n, fades_from(0), [&](const auto* d) {
      if (view_.statistics) accumulate_rows(row, rows, width, d);
      update_columns<Each<C>>(begin, n, d, 0, NoStatistics());
    });
  }

  template <class D>
  void accumulate_rows(int64_t row, int64_t rows, int64_t width, const D* d) {
    const int64_t begin = view_.begin_of(row), readable = view_.readable_from(begin);
    const S* const w = view_.weight + begin;
    const float* const thresholds = view_.job.rows.threshold + view_.shape.start + row;
    const C* const fades = fades_from(0);
    float* const out = view_.sums_of(row);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = r * width;
      if (fades && fades[i] < 0) continue;
      const Same<C> threshold = {C(thresholds[r])};
      store_row(sums_of_row<S>(width, w + i, d + i, threshold, readable - i), out + r * kSums);
    }
  }

  // Places the tile half a page away from the parameter's offset in its page. A load waits for an earlier store whose
  // address differs in the upper bits only, and in planes of whole pages sums and parameters would conflict all along.
  void place_tile() {
    const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
    const S* const first = view_.weight + column_address(view_.chunk.outer_begin, view_.chunk.row_begin);
    const uintptr_t shift = (address(first) + kPage / 2 - address(tile_memory_)) % kPage / 64 * 64;
    tile_ = reinterpret_cast<Tile<C>*>(tile_memory_ + shift);
  }

  int64_t column_address(int64_t outer, int64_t row) const {
    return (outer * view_.shape.rows + row) * view_.shape.inner + view_.chunk.inner_begin;
  }

  // The columns of a tile at one outer index. The first of them belongs to `row` and is element `begin`.
  void column_blocks(int64_t begin, int64_t row, int64_t columns) {
    for (int64_t column = 0; column < columns; column += kBlock) {
      const int64_t n = minimum(kBlock, columns - column), readable = columns - column;
      view_.gradient.template with_gradient<kTakesStored<S>>(begin + column, n, fades_from(column), [&](const auto* d) {
        column_block(begin + column, n, readable, d, row, column);
      });
    }
  }

  template <class D>
  void column_block(int64_t at, int64_t n, int64_t readable, const D* d, int64_t row, int64_t column) {
    Columns<C>& sums = tile_->columns;
    const C* threshold = tile_->threshold + column / columns_a_value_;
    if (!view_.statistics) {
      update_columns<Each<C>>(at, n, d, column, NoStatistics());
    } else if (single()) {
      using Statistics = SingleStatistics<C>;
      float* const out = view_.sums_of(row + column);
      update_columns<Each<C>>(at, n, d, column, Statistics{out, n, readable, {threshold}});
    } else if (sums.quads) {
      if constexpr (kHasRegisters<S> && __is_same(D, S)) {
        using Statistics = QuadStatistics<C, EachFour<C>>;
        const Statistics statistics = {sums.quad_sums + column, readable, {threshold}};
        if (columns_a_value_ == 4) return update_columns<EachFour<C>>(at, n, d, column, statistics);
      }
      using Statistics = QuadStatistics<C, Each<C>>;
      update_columns<Each<C>>(at, n, d, column, Statistics{sums.quad_sums + column, readable, {threshold}});
    } else {
      using Statistics = ColumnStatistics<C>;
      Lanes<C>* lanes = sums.sums + column / kLanes;
      update_columns<Each<C>>(at, n, d, column, Statistics{lanes, readable, {threshold}});
    }
  }

  template <class Values, class D, class Statistics>
  void update_columns(int64_t at, int64_t n, const D* d, int64_t column, Statistics statistics) {
    const int64_t first = column / columns_a_value_;
    if (mix_ == kUniform) {
      view_.update.update(at, n, d, Same<C>{factors_.decay[0]}, NoFade(), statistics);
    } else {
      const RowFades<C, Values> fade{{factors_.fade + first}};
      view_.update.update(at, n, d, Values{factors_.decay + first}, fade, statistics);
    }
  }

  const ChunkView<S, Update>& view_;
  // Of the rows of the tile.
  RowMix mix_ = kMixed;
  // Columns for each number in the arrays of factors and thresholds.
  int64_t columns_a_value_ = 1;
  ColumnFactors<C> factors_;
  Tile<C>* tile_;
  alignas(64) char tile_memory_[sizeof(Tile<C>) + kPage];
};

SPARSEKERN_END_ISA
