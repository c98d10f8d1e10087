#include "moments.h"

namespace sparsekern {

bool gates_fit(const ChannelArrays& arrays) {
  const int64_t* offsets = arrays.gate_offsets;
  if (offsets[0] != 0 || offsets[arrays.channels] != arrays.gates) return false;
  // A negative number has its highest bit set. There are no branches, so that the compiler vectorises the loops.
  const auto gates = static_cast<uint64_t>(arrays.gates), rows = static_cast<uint64_t>(arrays.rows);
  uint64_t below = 0;
  for (int64_t c = 0; c < arrays.channels; ++c) {
    const auto begin = static_cast<uint64_t>(offsets[c]), end = static_cast<uint64_t>(offsets[c + 1]);
    below |= begin | (gates - begin) | (end - begin);
  }
  for (int64_t g = 0; g < arrays.gates; ++g) {
    const auto row = static_cast<uint64_t>(arrays.gate_rows[g]);
    below |= row | (rows - 1 - row);
  }
  return below >> 63 == 0;
}

void channel_moments(const ChannelArrays& arrays, double decay) {
  constexpr int kSums = 4, kDot = 1;
  if (*arrays.pending != 0) {
    const float keep = static_cast<float>(decay), one_minus_decay = static_cast<float>(1 - decay);
    for (int64_t c = 0; c < arrays.channels; ++c) {
      float x = 0;
      for (int64_t g = arrays.gate_offsets[c]; g < arrays.gate_offsets[c + 1]; ++g)
        x += arrays.sums[arrays.gate_rows[g] * kSums + kDot];
      arrays.dot[c] = arrays.dot[c] * keep + x * one_minus_decay;
      arrays.dot_sq[c] = arrays.dot_sq[c] * keep + x * x * one_minus_decay;
    }
    *arrays.updates += 1;
  }
  for (int64_t r = 0; r < arrays.rows; ++r) arrays.sums[r * kSums + kDot] = 0;
  *arrays.pending = 0;
}

}  // namespace sparsekern
