#include "cut.h"

#include <algorithm>

namespace sparsekern::cuda {

namespace {

// Elements of a chunk: enough to amortise the cost of a block, few enough to use the whole device on small networks.
constexpr int64_t kChunk = 8 * 1024;

// Longest row that is not divided.
constexpr int64_t kWholeRow = 2 * kChunk;

// Longest row for one warp. With longer rows a chunk has fewer than four, and half of the block would be idle.
constexpr int64_t kWarpRow = kChunk / 4;

// Iterations of a block over short rows. An iteration waits for memory three times, independent of how much it loads.
constexpr int64_t kIterations = 4;

// Columns of a tile, in packs: 512 contiguous bytes, so that a chunk covers many outer indices and there are few
// partial sums.
constexpr int64_t kTileColumns = 32;

// Elements of the smallest tile of a normalisation: at least one pack for each thread.
constexpr int64_t kLeastTile = 4 * 1024;

constexpr int64_t kBlockThreads = 256, kWarpThreads = 32;

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Threads for a row: one for each pack, or one for each element in short rows, which contain few whole packs.
int32_t lanes_of(int64_t inner, int64_t pack) {
  if (inner > kWarpRow) return kBlockThreads;
  const int64_t useful = inner < kWarpThreads ? inner : divide_up(inner, pack);
  int32_t lanes = 1;
  while (lanes < kWarpThreads && lanes < useful) lanes *= 2;
  return lanes;
}

}  // namespace

Cut cut_of(const Shape& shape, int64_t element_size) {
  const int64_t pack = 16 / element_size;
  Cut cut = {};
  cut.inner_step = shape.inner > kWholeRow ? kChunk : shape.inner;
  cut.outer_step = 1;
  int64_t row_step;
  if (shape.outer == 1) {
    cut.lanes = lanes_of(shape.inner, pack);
    row_step = std::min(kChunk / cut.inner_step, kIterations * kBlockThreads / cut.lanes);
  } else {
    // Rounded up: if packs do not fit into rows, a tile of several rows has a thread for every element.
    row_step = kTileColumns / divide_up(shape.inner, pack);
  }
  row_step = std::max<int64_t>(1, std::min(row_step, shape.rows));
  if (shape.outer > 1) cut.outer_step = std::max<int64_t>(1, kChunk / (row_step * cut.inner_step));
  const int64_t pieces = divide_up(shape.outer, cut.outer_step) * divide_up(shape.inner, cut.inner_step);
  cut.row_step = static_cast<int32_t>(row_step);
  cut.pieces = static_cast<int32_t>(pieces);
  cut.chunks = static_cast<int32_t>(pieces * divide_up(shape.rows, row_step));
  return cut;
}

NormCut norm_cut(int64_t outer, int64_t channels, int64_t inner, int64_t element_size, int64_t tiles) {
  const int64_t pack = 16 / element_size;
  const int64_t elements = std::max(kLeastTile, divide_up(outer * channels * inner, tiles));
  NormCut cut = {};
  cut.width = static_cast<int32_t>(inner == 1 && channels % pack == 0 ? pack : 1);
  cut.lanes = lanes_of(inner, pack);
  const int64_t most_slots = inner > 1 ? kBlockThreads / cut.lanes : kTileColumns * pack / cut.width;
  cut.slots = 1;
  while (2 * cut.slots <= most_slots && cut.slots * cut.width < channels) cut.slots *= 2;
  const int64_t across = cut.slots * cut.width, ways = kBlockThreads / (cut.lanes * cut.slots);
  // A multiple of what the block reads at once. Rows that the lanes of a warp share are not divided.
  cut.inner_step = cut.lanes < kBlockThreads ? inner : divide_up(elements, kBlockThreads * pack) * kBlockThreads * pack;
  cut.inner_step = std::min(inner, cut.inner_step);
  cut.outer_step = divide_up(std::max<int64_t>(1, elements / (across * cut.inner_step)), ways) * ways;
  cut.inner_pieces = divide_up(inner, cut.inner_step);
  cut.pieces = divide_up(outer, cut.outer_step) * cut.inner_pieces;
  cut.blocks = cut.pieces * divide_up(channels, across);
  cut.folders = static_cast<int32_t>(
      std::clamp<int64_t>(kBlockThreads / (cut.slots * std::min(cut.width, kFoldWidth)), 1, kWarpThreads));
  return cut;
}

int64_t serial_merges(const NormCut& cut) {
  const int64_t at_once = std::min(cut.width, kFoldWidth);
  const int64_t parts = kBlockThreads / std::min<int64_t>(cut.lanes, kWarpThreads) / cut.slots;
  return cut.width / at_once * (divide_up(parts, cut.folders) - 1);
}

}  // namespace sparsekern::cuda
