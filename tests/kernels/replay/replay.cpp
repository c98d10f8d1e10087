// Repeats recorded calls of the native kernels without Python and torch: on another architecture, from another
// compiler. Reads calls from the standard input as record.py writes them, runs each on its recorded inputs, and
// compares every byte of the memory with what the recording machine had after the call.
//
//   replay [ISA] < calls
//
// NaN equals NaN: x86 and Arm give a new NaN different signs, and the operand that a NaN comes from is the compiler's
// choice. Prints counts as JSON. The exit status is 1 if a call differs, 2 if the input cannot be read.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/moments.h"
#include "cpu/norm_act.h"
#include "cpu/plan.h"

namespace sparsekern {
namespace {

enum Kind : int64_t { kEnd, kStep, kForward, kBackward, kChannels };

// Bytes on both sides of a buffer that no call may write.
constexpr int64_t kGuard = 64;
constexpr unsigned char kUntouched = 0xa5;

void read(void* to, int64_t bytes) {
  if (bytes > 0 && std::fread(to, 1, static_cast<size_t>(bytes), stdin) != static_cast<size_t>(bytes))
    throw std::runtime_error("the input ends within a call");
}

template <class T>
T number() {
  T value;
  read(&value, sizeof(value));
  return value;
}

template <class T>
std::vector<T> numbers(int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  read(values.data(), count * int64_t{sizeof(T)});
  return values;
}

// The size of an element: of those of abi.h, then of numbers without NaN, which are compared by bytes.
int64_t size_of(int64_t type) {
  constexpr int64_t kSizes[] = {4, 8, 2, 2, 1};
  return kSizes[type];
}

// Whether the bits of one element are those of a NaN.
bool is_nan(const unsigned char* element, int64_t type) {
  uint64_t bits = 0;
  std::memcpy(&bits, element, static_cast<size_t>(size_of(type)));
  switch (type) {
    case kFloat32: return (bits & 0x7fffffff) > 0x7f800000;
    case kFloat64: return (bits & 0x7fffffffffffffff) > 0x7ff0000000000000;
    case kBFloat16: return (bits & 0x7fff) > 0x7f80;
    case kFloat16: return (bits & 0x7fff) > 0x7c00;
    default: return false;
  }
}

// Memory of a call between guards, as far from an address of whole cache lines as it was recorded.
class Buffer {
 public:
  Buffer() {
    type_ = number<int64_t>();
    bytes_ = number<int64_t>();
    const int64_t offset = number<int64_t>();
    const int64_t before = 2 * kGuard + offset;
    memory_.reset(static_cast<unsigned char*>(std::aligned_alloc(kGuard, whole_lines(before + bytes_ + kGuard))));
    at_ = memory_.get() + before;
    std::memset(at_ - kGuard, kUntouched, static_cast<size_t>(bytes_ + 2 * kGuard));
    read(at_, bytes_);
    after_ = numbers<unsigned char>(bytes_);
  }

  void* at() const { return at_; }
  int64_t elements() const { return bytes_ / size_of(type_); }

  // The first element that differs from the recorded one; -1 if none does, -2 if a guard was written.
  int64_t difference() const {
    for (int64_t i = 1; i <= kGuard; ++i)
      if (at_[-i] != kUntouched || at_[bytes_ + i - 1] != kUntouched) return -2;
    if (bytes_ == 0 || std::memcmp(at_, after_.data(), static_cast<size_t>(bytes_)) == 0) return -1;
    const int64_t size = size_of(type_);
    for (int64_t i = 0; i < elements(); ++i) {
      const unsigned char *mine = at_ + i * size, *recorded = after_.data() + i * size;
      if (std::memcmp(mine, recorded, static_cast<size_t>(size)) != 0 &&
          !(is_nan(mine, type_) && is_nan(recorded, type_)))
        return i;
    }
    return -1;
  }

  std::string bits(int64_t i) const { return hex(at_, i) + ", recorded " + hex(after_.data(), i); }

 private:
  struct Free {
    void operator()(unsigned char* memory) const { std::free(memory); }
  };

  static size_t whole_lines(int64_t bytes) { return static_cast<size_t>((bytes + kGuard - 1) / kGuard * kGuard); }

  std::string hex(const unsigned char* from, int64_t i) const {
    uint64_t bits = 0;
    std::memcpy(&bits, from + i * size_of(type_), static_cast<size_t>(size_of(type_)));
    char text[32];
    std::snprintf(text, sizeof(text), "0x%" PRIx64, bits);
    return text;
  }

  int64_t type_, bytes_;
  std::unique_ptr<unsigned char[], Free> memory_;
  unsigned char* at_;
  std::vector<unsigned char> after_;
};

using Buffers = std::vector<Buffer>;

// The address of the next buffer that the input names; null for -1.
template <class T = void>
T* address(const Buffers& buffers) {
  const auto index = number<int64_t>();
  return index < 0 ? nullptr : static_cast<T*>(buffers.at(static_cast<size_t>(index)).at());
}

// As in csrc/module.cpp.
void step(const Buffers& buffers, const Kernels& kernels) {
  const auto op = static_cast<Op>(number<int64_t>());
  const auto dtype = static_cast<Dtype>(number<int64_t>());
  const bool update_statistics = number<int64_t>() != 0;
  const auto tensors = number<int64_t>();
  const Plan plan(numbers<Shape>(tensors));
  std::vector<void*> lists[kSlots];
  Job job = {};
  for (int slot = 0; slot < kSlots; ++slot) {
    for (int64_t i = 0; i < tensors; ++i) lists[slot].push_back(address(buffers));
    job.addresses[slot] = lists[slot].data();
  }
#define SPARSEKERN_FIELD(Type, name, per_row) job.rows.name = address<Type>(buffers);
  SPARSEKERN_ROW_ARRAYS(SPARSEKERN_FIELD)
#undef SPARSEKERN_FIELD
#define SPARSEKERN_FIELD(Type, name) job.hyper.name = static_cast<Type>(number<double>());
  SPARSEKERN_HYPER(SPARSEKERN_FIELD)
#undef SPARSEKERN_FIELD
  job.statistics = update_statistics && op != kMask && plan.tracks();
  job.fade = update_statistics && op != kStatistics;
  plan.run(job, kernels, op, dtype, nullptr, 1);
}

NormCall norm_call(const Buffers& buffers) {
  NormCall call = {};
  call.dtype = static_cast<Dtype>(number<int64_t>());
  call.outer = number<int64_t>();
  call.channels = number<int64_t>();
  call.inner = number<int64_t>();
  call.activation = static_cast<Activation>(number<int64_t>());
  call.training = number<int64_t>() != 0;
  call.eps = number<double>();
  call.x = address(buffers);
  call.residual = address(buffers);
  call.weight = address(buffers);
  call.bias = address(buffers);
  call.mask = address<uint8_t>(buffers);
  return call;
}

void forward(const Buffers& buffers, const Kernels& kernels) {
  const NormCall call = norm_call(buffers);
  NormForward to = {};
  to.momentum = number<double>();
  for (void** field : {&to.running_mean, &to.running_var, &to.y, &to.mean, &to.var}) *field = address(buffers);
  norm_act_forward(call, to, kernels, nullptr, 1);
}

void backward(const Buffers& buffers, const Kernels& kernels) {
  const NormCall call = norm_call(buffers);
  NormBackward to = {};
  to.tau = number<double>();
  to.decay = number<double>();
  for (const void** field : {&to.grad, &to.mean, &to.var}) *field = address(buffers);
  for (void** field : {&to.grad_x, &to.grad_residual, &to.grad_weight, &to.grad_bias}) *field = address(buffers);
  for (float** field : {&to.threshold, &to.activity, &to.updates}) *field = address<float>(buffers);
  norm_act_backward(call, to, kernels, nullptr, 1);
}

void channels(const Buffers& buffers) {
  ChannelArrays arrays = {};
  arrays.channels = number<int64_t>();
  arrays.gates = number<int64_t>();
  arrays.rows = number<int64_t>();
  const double decay = number<double>();
  for (const int64_t** field : {&arrays.gate_offsets, &arrays.gate_rows}) *field = address<int64_t>(buffers);
  for (float** field : {&arrays.sums, &arrays.dot, &arrays.dot_sq, &arrays.updates, &arrays.pending})
    *field = address<float>(buffers);
  if (!gates_fit(arrays)) throw std::runtime_error("a gate is not a row");
  channel_moments(arrays, decay);
}

struct Counts {
  int64_t calls = 0, buffers = 0, elements = 0, different = 0;
  bool last_is_different = false;
};

void compare(const std::string& name, const Buffers& buffers, Counts& counts) {
  bool same = true;
  for (size_t b = 0; b < buffers.size(); ++b) {
    counts.elements += buffers[b].elements();
    const int64_t at = buffers[b].difference();
    if (at == -1 || !same) continue;
    same = false;
    const std::string what =
        at == -2 ? "memory around it was written" : "element " + std::to_string(at) + ": " + buffers[b].bits(at);
    if (counts.different < 20) std::fprintf(stderr, "%s: buffer %zu: %s\n", name.c_str(), b, what.c_str());
  }
  ++counts.calls;
  counts.buffers += static_cast<int64_t>(buffers.size());
  counts.different += !same;
  counts.last_is_different = !same;
}

void replay(const Kernels& kernels, Counts& counts) {
  for (Kind kind; (kind = static_cast<Kind>(number<int64_t>())) != kEnd;) {
    const std::vector<char> name = numbers<char>(number<int64_t>());
    const Buffers buffers(static_cast<size_t>(number<int64_t>()));
    switch (kind) {
      case kStep: step(buffers, kernels); break;
      case kForward: forward(buffers, kernels); break;
      case kBackward: backward(buffers, kernels); break;
      case kChannels: channels(buffers); break;
      default: throw std::runtime_error("a call of an unknown kind");
    }
    compare({name.begin(), name.end()}, buffers, counts);
  }
}

}  // namespace
}  // namespace sparsekern

int main(int count, char** arguments) {
  using namespace sparsekern;
  try {
    std::string isa;
    Counts counts;
    replay(choose_kernels(count > 1 ? arguments[1] : "", isa), counts);
    std::printf("{\"isa\": \"%s\", \"calls\": %" PRId64 ", \"tensors\": %" PRId64 ", \"elements\": %" PRId64
                ", \"different\": %" PRId64 ", \"last_is_different\": %s}\n",
                isa.c_str(), counts.calls, counts.buffers, counts.elements, counts.different,
                counts.last_is_different ? "true" : "false");
    return counts.different > 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "replay: %s\n", error.what());
    return 2;
  }
}
