// Runs the kernels on small problems of all kinds of rows and layouts, and prints a hash of what they wrote.
//
//     drive ORDER STARVE [steps | norms]
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <vector>

#include "abi.h"

using namespace sparsekern;
using namespace sparsekern::cuda;

extern "C" {
int64_t sparsekern_cuda_cut(const Shape*, int64_t, int64_t, Cut*);
int sparsekern_cuda_step(const Call*);
int sparsekern_cuda_moments(const Moments*);
int64_t sparsekern_cuda_norm_scratch(int64_t, int64_t, int64_t, int64_t);
int sparsekern_cuda_norm_forward(const Norm*);
int sparsekern_cuda_norm_backward(const Norm*);
const char* sparsekern_cuda_error(int);
void emulation_order(unsigned, int);
}

namespace {

uint64_t hash = 1469598103934665603u;  // FNV-1a
uint32_t state = 12345;

float random() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / 8388608.0f - 1;
}

// An aligned array that lives as long as the program and takes part in the hash.
struct Array {
  std::unique_ptr<unsigned char, void (*)(void*)> memory;
  size_t bytes;
};
std::vector<Array> arrays;

template <class T>
T* array(size_t count) {
  const size_t bytes = count * sizeof(T);
  void* const memory = aligned_alloc(64, (bytes + 64) / 64 * 64);
  memset(memory, 0, bytes);
  arrays.push_back({{static_cast<unsigned char*>(memory), free}, bytes});
  return static_cast<T*>(memory);
}

float* filled(size_t count) {
  float* const found = array<float>(count);
  for (size_t i = 0; i < count; ++i) found[i] = random();
  return found;
}

float* squares(size_t count) {
  float* const found = filled(count);
  for (size_t i = 0; i < count; ++i) found[i] *= found[i];
  return found;
}

void hash_all() {
  for (const Array& one : arrays)
    for (size_t i = 0; i < one.bytes; ++i) hash = (hash ^ one.memory.get()[i]) * 1099511628211u;
  arrays.clear();
}

void check(int code, const char* what) {
  if (code == 0) return;
  fprintf(stderr, "%s: error %d, %s\n", what, code, sparsekern_cuda_error(code));
  exit(3);
}

// Outer size, rows, inner size and first row: long and short rows, divided ones, columns, tensors without rows.
const Shape kShapes[] = {
    {1, 5, 1030, 0},  {1, 3, 2049, 5},   {1, 2, 16500, 8},   {1, 1, 3001, -1},   {1, 70, 9, 10},   {1, 300, 1, 80},
    {70, 40, 4, 380}, {7, 33, 9, 420},   {3, 2, 300, 453},   {90, 150, 1, 455},  {1, 64, 64, 605}, {1, 20, 128, 669},
};
constexpr int64_t kRows = 689, kChannels = 600;

Hyper hyper() {
  Hyper of = {};
  of.weight_decay = 0.01;
  of.momentum = of.beta1 = of.decay = 0.9;
  of.beta2 = 0.999;
  of.eps = 1e-8;
  of.tau = 1;
  of.decoupled = 1;
  return of;
}

void moments(float* sums, float* pending) {
  int64_t *offsets = array<int64_t>(kChannels + 1), *gates = array<int64_t>(kChannels);
  for (int64_t c = 0; c <= kChannels; ++c) offsets[c] = c;
  for (int64_t c = 0; c < kChannels; ++c) gates[c] = c * 5 % kRows;
  Moments call = {};
  call.gate_offsets = offsets;
  call.gate_rows = gates;
  call.sums = sums;
  call.dot = array<float>(kChannels);
  call.dot_sq = array<float>(kChannels);
  call.updates = array<float>(1);
  call.pending = pending;
  call.ticket = array<uint32_t>(1);
  call.channels = kChannels;
  call.rows = kRows;
  call.decay = 0.9;
  check(sparsekern_cuda_moments(&call), "moments");
}

void step(Op op) {
  constexpr int64_t kTensors = sizeof(kShapes) / sizeof(kShapes[0]);
  std::vector<Cut> cuts(kTensors);
  const int64_t partials = sparsekern_cuda_cut(kShapes, kTensors, sizeof(float), cuts.data());
  std::vector<void*> addresses(kSlots * kTensors, nullptr);
  RowArrays rows = {};
  rows.elements = array<float>(kRows);
  rows.countdown = array<int32_t>(kRows);
  for (int64_t i = 0; i < kTensors; ++i) {
    const Shape& shape = kShapes[i];
    const size_t count = static_cast<size_t>(shape.outer * shape.rows * shape.inner);
    for (int slot : {kParam, kGrad, kState0}) addresses[slot * kTensors + i] = filled(count);
    addresses[kState1 * kTensors + i] = squares(count);
    float* const number = array<float>(1);
    *number = 3;
    addresses[kStep * kTensors + i] = number;
    for (int64_t r = 0; shape.start >= 0 && r < shape.rows; ++r)
      rows.elements[shape.start + r] = static_cast<float>(shape.outer * shape.inner);
  }
  // Some rows are masked, some fade.
  for (int r = 0; r < kRows; ++r) rows.countdown[r] = r % 7 == 3 ? 0 : r % 11 == 5 ? 4 : -1;
  rows.penalty = array<float>(kRows);
  rows.sums = array<float>(kRows * 4);
  rows.threshold = squares(kRows);
  rows.activity = array<float>(kRows);
  rows.nonfinite = array<int64_t>(1);
  rows.pending = array<float>(1);
#define SPARSEKERN_FIELD(Type, name, per_row) addresses.push_back(rows.name);
  SPARSEKERN_ROW_ARRAYS(SPARSEKERN_FIELD)
#undef SPARSEKERN_FIELD
  Call call = {};
  call.shapes = kShapes;
  call.cuts = cuts.data();
  call.addresses = addresses.data();
  call.partials = array<float>(static_cast<size_t>(partials * 4));
  call.hyper = hyper();
  call.lr.value = 0.1;
  call.tensors = kTensors;
  call.op = op;
  call.dtype = kFloat32;
  check(sparsekern_cuda_step(&call), "step");
  moments(rows.sums, rows.pending);
  hash_all();
}

template <class S>
S* values(int64_t count, Dtype dtype) {
  S* const found = array<S>(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const float value = random();
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    const uint16_t high = static_cast<uint16_t>(bits >> 16);
    dtype == kFloat32 ? memcpy(found + i, &bits, 4) : memcpy(found + i, &high, 2);
  }
  return found;
}

template <class S>
void norm(int64_t outer, int64_t channels, int64_t inner, Dtype dtype) {
  const int64_t count = outer * channels * inner;
  const size_t vector = static_cast<size_t>(channels);
  uint8_t* const mask = array<uint8_t>(vector);
  for (int64_t c = 0; c < channels; ++c) mask[c] = c % 5 == 2;
  Norm call = {};
  call.x = values<S>(count, dtype);
  call.out = array<S>(static_cast<size_t>(count));
  call.weight = filled(vector);
  call.bias = filled(vector);
  call.running_mean = filled(vector);
  call.running_var = squares(vector);
  call.mean = array<float>(vector);
  call.var = array<float>(vector);
  call.mask = mask;
  call.scratch = array<double>(static_cast<size_t>(sparsekern_cuda_norm_scratch(outer, channels, inner, sizeof(S))));
  call.outer = outer;
  call.channels = channels;
  call.inner = inner;
  call.eps = 1e-5;
  call.momentum = 0.1;
  call.training = 1;
  call.dtype = dtype;
  call.activation = kRelu;
  check(sparsekern_cuda_norm_forward(&call), "forward");
  call.grad = values<S>(count, dtype);
  call.out = array<S>(static_cast<size_t>(count));
  call.grad_weight = array<float>(vector);
  call.grad_bias = array<float>(vector);
  call.threshold = squares(vector);
  call.activity = array<float>(vector);
  call.updates = array<float>(1);
  call.tau = 1;
  call.decay = 0.9;
  check(sparsekern_cuda_norm_backward(&call), "backward");
  hash_all();
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) return 2;
  emulation_order(static_cast<unsigned>(atoi(arguments[1])), atoi(arguments[2]));
  const char* const only = count > 3 ? arguments[3] : "";
  if (strcmp(only, "norms") != 0)
    for (Op op : {kSgd, kAdam, kStatistics}) step(op);
  if (strcmp(only, "steps") != 0) {
    norm<float>(3, 5, 21, kFloat32);
    norm<float>(2, 3, 61 * 67, kFloat32);
    norm<float>(300, 20, 1, kFloat32);
    norm<float>(700, 6, 2, kFloat32);
    norm<uint16_t>(1100, 24, 1, kBFloat16);
    norm<uint16_t>(150, 264, 1, kBFloat16);
    norm<uint16_t>(3, 9, 49, kBFloat16);
  }
  printf("%016llx\n", static_cast<unsigned long long>(hash));
}
