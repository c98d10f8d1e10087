// How tensors are cut into chunks.
#pragma once

#include "abi.h"

namespace sparsekern::cuda {

// The cut of one tensor, without the place of its partial sums. Which thread adds up what depends on it, so it knows
// shape and dtype and nothing else.
Cut cut_of(const Shape& shape, int64_t element_size);

// How the channels of x[outer][channels][inner] are shared out. A block works on a tile: some neighbouring channels, in
// a range of outer indices and of inner ones. Its threads are lanes within slots within ways: `lanes` neighbours share
// `width` channels, `slots` times `width` channels are taken at once, and `ways` share the outer indices. All three are
// powers of two.
struct NormCut {
  int64_t outer_step, inner_step;  // of a tile
  int64_t inner_pieces, pieces;    // tiles of the same channels, along inner and in all
  int64_t blocks;
  int32_t lanes, slots, width;
};

// `tiles`: how many there are at most, about, in a large tensor. Which thread adds up what depends on the cut, so it
// knows shape and dtype and nothing else.
NormCut norm_cut(int64_t outer, int64_t channels, int64_t inner, int64_t element_size, int64_t tiles);

}  // namespace sparsekern::cuda
