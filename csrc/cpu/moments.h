// The running means per channel (gradient times weight of its gates, and its square), updated once per step.
#pragma once

#include <cstdint>

namespace sparsekern {

// The arrays of a RowTable that describe its channels (sparsekern/kernels/rows.py).
struct ChannelArrays {
  int64_t channels, gates, rows;
  const int64_t* gate_offsets;  // [channels + 1]
  const int64_t* gate_rows;     // [gates]
  float* sums;                  // [rows, 4]
  float* dot;                   // [channels]
  float* dot_sq;                // [channels]
  float* updates;
  float* pending;
};

// Whether the offsets rise from 0 to the number of gates and every gate is a row of the table.
bool gates_fit(const ChannelArrays& arrays);

// Updates the means. Requires gates_fit().
void channel_moments(const ChannelArrays& arrays, double decay);

}  // namespace sparsekern
