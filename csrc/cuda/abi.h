// The C interface of the CUDA library: the structs that Python passes. sparsekern/kernels/native/cuda_library.py
// mirrors them field by field. The library is stateless: Python owns all memory, and nothing here allocates, waits for
// the device or reads from it.
#pragma once

#include "../abi.h"

namespace sparsekern::cuda {

// How a tensor is divided into chunks, one thread block each. It depends on shape and dtype alone.
struct Cut {
  int64_t outer_step, inner_step;  // outer indices and inner elements of a chunk
  int64_t partial;                 // row r of piece p has its partial sums at (partial + p * rows + r) * 4
  int32_t row_step;                // rows of a chunk
  int32_t pieces;                  // chunks that share a row
  int32_t chunks;
  int32_t lanes;  // threads that share a row, a power of two; 0 if outer > 1
};

// A number: the one at `address` on the device, or `value` if `address` is null.
struct Scalar {
  const void* address;
  double value;
  int32_t dtype;  // Dtype of the number at `address`
};

// One call over a list of tensors. `hyper.lr`, `hyper.grad_scale` and `hyper.scaled` are not read.
struct Call {
  const Shape* shapes;     // [tensors]
  const Cut* cuts;         // [tensors]
  void* const* addresses;  // [kSlots][tensors], then the eight of RowArrays, read if a tensor is tracked
  float* partials;
  void* stream;
  Hyper hyper;
  Scalar lr, grad_scale, found_inf;  // absent if the address is null and the value 0
  int64_t tensors;
  int32_t op, dtype, device;
};

// The arguments of the update of the means per channel.
struct Moments {
  const int64_t* gate_offsets;  // [channels + 1]
  const int64_t* gate_rows;
  float* sums;  // [rows, 4]
  float* dot;
  float* dot_sq;
  float* updates;
  float* pending;
  uint32_t* ticket;  // 0 between two calls
  void* stream;
  int64_t channels, rows;
  double decay;
  int32_t device;
};

// Normalisation with its activation over x[outer][channels][inner]. Tensors have `dtype`. Vectors have a number per
// channel: float64 for kFloat64, else float32. These may be null: residual, weight, bias, mask, both running statistics
// in training, and all three of threshold, activity and updates.
struct Norm {
  const void* x;
  const void* residual;
  const void* grad;     // of the output, backward only
  void* out;            // the output; the gradient of x backward
  void* grad_residual;  // backward, with a residual
  const void* weight;
  const void* bias;
  void* running_mean;  // forward only; read in evaluation, and for masked channels; written if momentum is not 0
  void* running_var;
  void* mean;  // written forward, read backward
  void* var;
  const uint8_t* mask;
  void* grad_weight;  // backward only
  void* grad_bias;
  double* scratch;   // of the size that sparsekern_cuda_norm_scratch returns; not used forward in evaluation
  float* threshold;  // the fields of ChannelCounts, backward only
  float* activity;
  float* updates;
  void* stream;
  int64_t outer, channels, inner;
  double eps, tau, decay;
  double momentum;     // weight of the batch in the running statistics, 0 to leave them, forward in training only
  int32_t activation;  // Activation
  int32_t training, dtype, device;
};

}  // namespace sparsekern::cuda
