// The means per channel, once per step.
#pragma once

#include <cstdint>

namespace sparsekern {

// The arrays of a RowTable that make up its channels (sparsekern/_rows.py).
struct ChannelArrays {
  const int64_t* gate_offsets;  // [channels + 1]
  const int64_t* gate_rows;
  float* sums;  // [rows, 4]
  float* dot;
  float* dot_sq;
  float* updates;
  float* pending;
};

void channel_moments(const ChannelArrays& arrays, int64_t channels, int64_t rows, double decay);

}  // namespace sparsekern
