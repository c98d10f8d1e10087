// How tensors are cut into chunks.
#pragma once

#include "abi.h"

namespace sparsekern::cuda {

// The cut of one tensor, without the place of its partial sums. Which thread adds up what depends on it, so it knows
// shape and dtype and nothing else.
Cut cut_of(const Shape& shape, int64_t element_size);

}  // namespace sparsekern::cuda
