// How tensors are divided among thread blocks, for steps and for normalisations.
#pragma once

#include "abi.h"

namespace sparsekern::cuda {

// Divides one tensor; the caller sets `partial`. The order of additions depends on the result, so it is a function of
// shape and dtype alone.
Cut cut_of(const Shape& shape, int64_t element_size);

// How the channels of x[outer][channels][inner] are divided. A block works on a tile: some neighbouring channels over a
// range of outer and of inner indices. Its threads are lanes within slots within ways: `lanes` neighbouring threads
// share `width` channels, the block works on `slots` times `width` channels at once, and `ways` share the outer
// indices. All three are powers of two.
struct NormCut {
  int64_t outer_step, inner_step;  // of a tile
  int64_t inner_pieces, pieces;    // tiles of the same channels, along inner and in all
  int64_t blocks;
  int32_t lanes, slots, width;
  int32_t folders;  // threads that merge the sums of one channel of a tile, a power of two, at most a warp
};

// Channels of a slot whose sums a block merges at once, in 32 KB of shared memory.
constexpr int32_t kFoldWidth = 4;

// Divides x into about `tiles` tiles at most. The order of additions depends on the result, so it is a function of
// shape, dtype and `tiles` alone.
NormCut norm_cut(int64_t outer, int64_t channels, int64_t inner, int64_t element_size, int64_t tiles);

// Merges that a thread makes one after the other in a tile, not counting those among the lanes of a warp.
int64_t serial_merges(const NormCut& cut);

}  // namespace sparsekern::cuda
