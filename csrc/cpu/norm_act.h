// Batch normalisation with its activation: one call for a forward or a backward pass.
#pragma once

#include <cstdint>

#include "../abi.h"
#include "parallel.h"

namespace sparsekern {

// Data and vectors as in sparsekern/kernels/backends/reference/norm_act.py. Element (o, c, i) of the data is at
// (o * channels + c) * inner + i. A vector has one number per channel, of the compute type unless its type says
// otherwise; null if absent.
struct NormCall {
  Dtype dtype;
  Activation activation;
  int64_t outer, channels, inner;
  int32_t training;
  double eps;
  const void *x, *residual;
  const void *weight, *bias;
  const uint8_t *mask;
};

struct NormForward {
  void *running_mean, *running_var;  // updated: momentum is the weight of this batch
  double momentum;
  void *y, *mean, *var;
};

struct NormBackward {
  const void *grad, *mean, *var;
  void *grad_x, *grad_residual, *grad_weight, *grad_bias;
  float *threshold, *activity, *updates;  // all null if gradients are not counted
  double tau, decay;
};

Error norm_act_forward(const NormCall &, const NormForward &, const Kernels &, ParallelFor, int64_t threads);
Error norm_act_backward(const NormCall &, const NormBackward &, const Kernels &, ParallelFor, int64_t threads);

}  // namespace sparsekern
