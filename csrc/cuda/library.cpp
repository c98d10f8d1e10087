// The exported functions of the CUDA library. They turn lists of addresses into tables and launch kernels on them.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>

#include "cut.h"
#include "kernels.h"
#include "norm.h"

#define SPARSEKERN_EXPORT extern "C" __attribute__((visibility("default")))

namespace sparsekern::cuda {
namespace {

std::atomic<int64_t> launches = 0;

// The kernel of an op, its number of state lists, and whether it needs gradients.
struct Requirements {
  Kernel kernel;
  int32_t states;
  bool grad;
};

Requirements requirements_of(const Call& call) {
  switch (call.op) {
    case kSgd: return call.hyper.momentum == 0 ? Requirements{kSgdPlain, 0, true} : Requirements{kSgdMomentum, 1, true};
    case kAdam: return call.hyper.amsgrad ? Requirements{kAdamAmsgrad, 3, true} : Requirements{kAdamPlain, 2, true};
    case kStatistics: return {kExternalStatistics, 0, true};
    default: return {kExternalMask, 0, false};
  }
}

bool is_given(const Scalar& scalar) {
  return scalar.address != nullptr || scalar.value != 0;
}

// Makes the device of a call the current one during its lifetime.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error = cudaGetDevice(&before_);
    if (error == cudaSuccess && before_ != device) error = cudaSetDevice(device);
    changed_ = error == cudaSuccess && before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Fills the table except for its entries. False if an address is missing.
bool fill_head(const Call& call, Table& table) {
  table.hyper = call.hyper;
  table.hyper.decoupled = call.op == kMask || call.hyper.decoupled;
  table.log_beta1 = std::log(call.hyper.beta1);
  table.log_beta2 = std::log(call.hyper.beta2);
  table.partials = call.partials;
  table.lr = call.lr;
  table.grad_scale = call.grad_scale;
  table.found_inf = call.found_inf;
  table.scaled = is_given(call.grad_scale);
  table.skippable = is_given(call.found_inf);
  table.statistics = call.op != kMask;
  table.fades = call.op != kStatistics;
  table.counts = call.op == kAdam;
  table.tracks = false;
  bool cut_rows = false;
  for (int64_t i = 0; i < call.tensors; ++i) {
    table.tracks = table.tracks || call.shapes[i].start >= 0;
    cut_rows = cut_rows || (call.shapes[i].start >= 0 && call.cuts[i].pieces > 1);
  }
  table.rows = {};
  if (!table.tracks) return true;
  void* const* arrays = call.addresses + kSlots * call.tensors;
  if (std::any_of(arrays, arrays + 8, [](void* array) { return array == nullptr; })) return false;
  table.rows = {static_cast<float*>(arrays[0]),   static_cast<float*>(arrays[1]), static_cast<int32_t*>(arrays[2]),
                static_cast<float*>(arrays[3]),   static_cast<float*>(arrays[4]), static_cast<float*>(arrays[5]),
                static_cast<int64_t*>(arrays[6]), static_cast<float*>(arrays[7])};
  const uintptr_t sums = reinterpret_cast<uintptr_t>(table.rows.sums) | reinterpret_cast<uintptr_t>(table.partials);
  table.sums_aligned = sums % 16 == 0;
  return !cut_rows || call.partials != nullptr;
}

// Fills the entry of one tensor. False if an address is missing.
bool fill_entry(const Call& call, const Requirements& needs, int64_t tensor, int32_t first_chunk, Entry& entry) {
  const Shape& shape = call.shapes[tensor];
  const Cut& cut = call.cuts[tensor];
  const int slots = kState0 + needs.states;
  uintptr_t bits = 0;
  for (int slot = 0; slot < kStep; ++slot) {
    const bool needed = slot < slots && (slot != kGrad || needs.grad);
    void* address = needed ? call.addresses[slot * call.tensors + tensor] : nullptr;
    if (needed && address == nullptr) return false;
    if (slot != kGrad) bits |= reinterpret_cast<uintptr_t>(address);
    entry.address[slot] = address;
  }
  entry.step = call.op == kAdam ? static_cast<float*>(call.addresses[kStep * call.tensors + tensor]) : nullptr;
  entry.outer = shape.outer;
  entry.inner = shape.inner;
  entry.rows = static_cast<int32_t>(shape.rows);
  entry.start = static_cast<int32_t>(shape.start);
  entry.outer_step = cut.outer_step;
  entry.inner_step = cut.inner_step;
  entry.partial = cut.partial;
  entry.row_step = cut.row_step;
  entry.pieces = cut.pieces;
  entry.lanes = cut.lanes;
  entry.first_chunk = first_chunk;
  entry.aligned = bits % 16 == 0;
  entry.grad_aligned = reinterpret_cast<uintptr_t>(entry.address[kGrad]) % 16 == 0;
  return call.op != kAdam || entry.step != nullptr;
}

cudaError_t launch(const Call& call, Kernel kernel, const ManyTensors& list) {
  const auto stream = static_cast<cudaStream_t>(call.stream);
  const auto step = call.dtype == kFloat32    ? step_float32
                    : call.dtype == kFloat64  ? step_float64
                    : call.dtype == kBFloat16 ? step_bfloat16
                                              : step_float16;
  const cudaError_t error = step(kernel, list, stream);
  ++launches;
  if (error != cudaSuccess || !(list.table.tracks || list.table.counts)) return error;
  ++launches;
  return finish_step(list, stream);
}

int run(const Call& call) {
  const Requirements needs = requirements_of(call);
  ManyTensors list;
  Table& table = list.table;
  if (!fill_head(call, table)) return -kNullPointer;
  // All tensors are checked before the first launch.
  for (int64_t i = 0; i < call.tensors; ++i)
    if (!fill_entry(call, needs, i, 0, list.entries[0])) return -kNullPointer;
  const DeviceGuard guard(call.device);
  if (guard.error != cudaSuccess) return guard.error;
  for (int64_t first = 0; first < call.tensors; first += kTableTensors) {
    table.tensors = static_cast<int32_t>(std::min<int64_t>(kTableTensors, call.tensors - first));
    table.chunks = 0;
    for (int32_t i = 0; i < table.tensors; ++i) {
      fill_entry(call, needs, first + i, table.chunks, list.entries[i]);
      table.chunks += call.cuts[first + i].chunks;
    }
    const cudaError_t error = launch(call, needs.kernel, list);
    if (error != cudaSuccess) return error;
  }
  return 0;
}

}  // namespace
}  // namespace sparsekern::cuda

using namespace sparsekern;
using namespace sparsekern::cuda;

// The sizes of the structs that Python mirrors, so that it can detect a library of another version.
SPARSEKERN_EXPORT void sparsekern_cuda_sizes(int64_t* sizes) {
  sizes[0] = sizeof(Shape);
  sizes[1] = sizeof(Cut);
  sizes[2] = sizeof(Call);
  sizes[3] = sizeof(Moments);
  sizes[4] = sizeof(RowArrays);
  sizes[5] = sizeof(Norm);
}

// Divides a list of tensors and returns the number of partial sums, of four floats each, that a call over it needs.
SPARSEKERN_EXPORT int64_t sparsekern_cuda_cut(const Shape* shapes, int64_t tensors, int64_t element_size, Cut* cuts) {
  int64_t partials = 0;
  for (int64_t i = 0; i < tensors; ++i) {
    cuts[i] = cut_of(shapes[i], element_size);
    cuts[i].partial = partials;
    if (shapes[i].start >= 0 && cuts[i].pieces > 1) partials += cuts[i].pieces * shapes[i].rows;
  }
  return partials;
}

// Size in doubles of the scratch memory for a normalisation of x[outer][channels][inner].
SPARSEKERN_EXPORT int64_t sparsekern_cuda_norm_scratch(int64_t outer, int64_t channels, int64_t inner,
                                                       int64_t element_size) {
  return norm_scratch(outer, channels, inner, element_size);
}

// Merges that a thread makes one after the other where the sums of such a normalisation are merged in a block.
SPARSEKERN_EXPORT int64_t sparsekern_cuda_norm_merges(int64_t outer, int64_t channels, int64_t inner,
                                                      int64_t element_size) {
  return norm_merges(outer, channels, inner, element_size);
}

// The following functions return 0, a CUDA error, or the negative of an Error if nothing was launched.
SPARSEKERN_EXPORT int sparsekern_cuda_step(const Call* call) {
  return run(*call);
}

SPARSEKERN_EXPORT int sparsekern_cuda_moments(const Moments* moments) {
  const DeviceGuard guard(moments->device);
  if (guard.error != cudaSuccess) return guard.error;
  ++launches;
  return fold_moments(*moments, static_cast<cudaStream_t>(moments->stream));
}

SPARSEKERN_EXPORT int sparsekern_cuda_norm_forward(const Norm* norm) {
  const DeviceGuard guard(norm->device);
  return guard.error != cudaSuccess ? guard.error : run_norm_forward(*norm, launches);
}

SPARSEKERN_EXPORT int sparsekern_cuda_norm_backward(const Norm* norm) {
  const DeviceGuard guard(norm->device);
  return guard.error != cudaSuccess ? guard.error : run_norm_backward(*norm, launches);
}

SPARSEKERN_EXPORT int sparsekern_cuda_try(int device) {
  const DeviceGuard guard(device);
  return guard.error != cudaSuccess ? guard.error : try_device();
}

SPARSEKERN_EXPORT const char* sparsekern_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// Number of launches of this process.
SPARSEKERN_EXPORT int64_t sparsekern_cuda_launches() {
  return launches;
}
