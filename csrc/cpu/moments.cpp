#include "moments.h"

namespace sparsekern {

void channel_moments(const ChannelArrays& arrays, int64_t channels, int64_t rows, double decay) {
  constexpr int kSums = 4, kDot = 1;
  if (*arrays.pending != 0) {
    const float keep = static_cast<float>(decay), fresh = static_cast<float>(1 - decay);
    for (int64_t c = 0; c < channels; ++c) {
      float x = 0;
      for (int64_t g = arrays.gate_offsets[c]; g < arrays.gate_offsets[c + 1]; ++g)
        x += arrays.sums[arrays.gate_rows[g] * kSums + kDot];
      arrays.dot[c] = arrays.dot[c] * keep + x * fresh;
      arrays.dot_sq[c] = arrays.dot_sq[c] * keep + x * x * fresh;
    }
    *arrays.updates += 1;
  }
  for (int64_t r = 0; r < rows; ++r) arrays.sums[r * kSums + kDot] = 0;
  *arrays.pending = 0;
}

}  // namespace sparsekern
