// The only contract between Python and native code: plain structs of addresses and numbers.
//
// The files of each ISA include this header, so it holds no inline function: the linker keeps one copy of an inline
// function, and that copy might use instructions that the machine lacks.
#pragma once

#include <stdint.h>

namespace sparsekern {

enum Dtype : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16, kDtypes };

enum Op : int32_t { kSgd, kAdam, kStatistics, kMask, kOps };

// The lists of tensors of a call, in this order. SGD keeps its momentum in kState0; Adam has exp_avg, exp_avg_sq,
// max_exp_avg_sq there and one float per tensor in kStep.
enum Slot : int32_t { kParam, kGrad, kState0, kState1, kState2, kStep, kSlots };

enum Error : int32_t { kOk = 0, kNullPointer = 1, kParallelFailed = 2 };

// A dense tensor in memory: element (o, r, i) is at (o * rows + r) * inner + i. `start` is the index of its first row
// in the flat arrays, or -1 for a tensor without tracked rows, which is treated as one row.
struct Shape {
  int64_t outer, rows, inner;
  int64_t start;
};

// A chunk of one tensor, the unit of work. A row may be divided among several chunks, by ranges of outer indices or of
// inner elements; each of them writes one partial sum, and `piece` is its number.
struct Chunk {
  int32_t tensor, piece;
  int64_t outer_begin, outer_end;
  int64_t row_begin, row_end;
  int64_t inner_begin, inner_end;
};

// Where the sums of a tensor's rows are stored: in the flat array if a row is one piece, else in `partials` at
// (offset + piece * rows + row) * 4.
struct Pieces {
  int64_t count, offset;
};

// The flat arrays of a RowTable, which sparsekern/kernels/rows.py describes: type, name, and elements per row (0: one
// element for the whole table). Python lists the same names in the same order; the module exports these, and a test
// compares them.
// clang-format off
#define SPARSEKERN_ROW_ARRAYS(field) \
  field(float, penalty, 1)           \
  field(float, elements, 1)          \
  field(int32_t, countdown, 1)       \
  field(float, sums, 4)              \
  field(float, threshold, 1)         \
  field(float, activity, 1)          \
  field(int64_t, nonfinite, 0)       \
  field(float, pending, 0)
// clang-format on

struct RowArrays {
#define SPARSEKERN_FIELD(Type, name, per_row) Type* name;
  SPARSEKERN_ROW_ARRAYS(SPARSEKERN_FIELD)
#undef SPARSEKERN_FIELD
};

// The hyperparameters of a step: type and name. Python passes its options in this order; the module exports the names.
// clang-format off
#define SPARSEKERN_HYPER(field)                           \
  field(double, lr) field(double, weight_decay)           \
  field(double, momentum) field(double, dampening)        /* SGD */ \
  field(double, beta1) field(double, beta2) field(double, eps) /* Adam */ \
  field(double, grad_scale)                               /* read when `scaled` */ \
  field(double, tau) field(double, decay)                 /* of the row statistics */ \
  field(int32_t, nesterov) field(int32_t, first)          /* SGD */ \
  field(int32_t, decoupled) field(int32_t, amsgrad)       /* Adam */ \
  field(int32_t, maximize) field(int32_t, scaled)
// clang-format on

struct Hyper {
#define SPARSEKERN_FIELD(Type, name) Type name;
  SPARSEKERN_HYPER(SPARSEKERN_FIELD)
#undef SPARSEKERN_FIELD
};

// Adam's bias corrections, per tensor because every tensor has its own step.
struct AdamBias {
  double step_size, inverse_root;
};

// One call over a list of tensors.
struct Job {
  const Shape* shapes;
  const Pieces* pieces;
  void* const* addresses[kSlots];  // [slot][tensor]
  const AdamBias* bias;            // [tensor], Adam only
  float* partials;
  RowArrays rows;  // all null if no tensor is tracked
  Hyper hyper;
  int32_t statistics;  // update sums, means and thresholds
  int32_t fade;        // apply and advance the countdowns
  int32_t apart;       // of Kernels
};

// The activation behind a batch normalisation. Each of them is 0 at 0.
enum Activation : int32_t { kIdentity, kRelu, kRelu6, kHardswish, kSilu, kActivations };

// A batch normalisation with its activation, or its gradient. Element (o, c, i) of the data is at
// (o * channels + c) * inner + i. If inner is 1, a row repeats the channels until its length is a multiple of
// kNormWidth, and `channels` is that length.
constexpr int64_t kNormWidth = 64;

struct NormJob {
  int64_t outer, channels, inner;
  const void *x, *residual, *grad;  // null if absent
  void *y, *grad_x, *grad_residual;
  // One number of the compute type for each channel of a row.
  const void *scale, *shift;          // z = x * scale + shift + residual
  const void *mean, *slope, *offset;  // grad_x = dz * scale (+ (x - mean) * slope + offset)
  const void* threshold;
  const void* live;  // a mask: all bits set, or 0 in masked channels
  int32_t centred;   // the part in parentheses is added
};

// A piece of the data: one channel, or all channels of some rows if inner is 1. Sums go to `out`, in planes of one
// number for each channel of a row.
struct NormPiece {
  int64_t outer_begin, outer_end;
  int64_t channel;
  double* out;
};

// Planes of a piece. The deviation is the sum of squared distances from the mean.
enum NormMoment : int32_t { kMeanOf, kDeviation, kMoments };
enum NormSum : int32_t { kGradSum, kGradDot, kGradSq, kGradCount, kNormSums };

struct NormKernels {
  void (*moments)(const NormJob*, const NormPiece*);
  void (*forward[kActivations])(const NormJob*, const NormPiece*);
  void (*sums[kActivations])(const NormJob*, const NormPiece*);
  void (*backward[kActivations])(const NormJob*, const NormPiece*);
};

// The kernels of one ISA.
struct Kernels {
  int32_t apart;  // the statistics of long rows are taken in a loop of their own, before the update (AVX-512, float32)
  void (*chunk[kOps][kDtypes])(const Job*, const Chunk*);
  void (*finish)(const Job*, int32_t tensor);  // the rows of a tensor, after its last chunk
  const NormKernels* norm[kDtypes];
};

}  // namespace sparsekern
