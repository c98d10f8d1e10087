#include "norm_module.h"

#include <pybind11/stl.h>

#include <array>
#include <utility>
#include <vector>

#include "cpu/norm_act.h"
#include "overlap.h"
#include "runtime.h"

namespace py = pybind11;

namespace sparsekern {
namespace {

constexpr int kMismatch = -1;

// Kinds of tensors of a call: data of the shape of x, one number of the compute type per channel, the mask, and the
// arrays of the gradient counts (float32: per channel, or a single number).
enum Kind { kData, kVector, kMasked, kPerChannel, kSingle };

// The kinds of the tensors of a call, in the order of the fields of NormCall, NormForward and NormBackward.
constexpr std::array<Kind, 5> kInputs = {kData, kData, kVector, kVector, kMasked};
constexpr std::array<Kind, 5> kForward = {kVector, kVector, kData, kVector, kVector};
constexpr std::array<Kind, 10> kBackward = {kData,   kVector, kVector,     kData,       kData,
                                            kVector, kVector, kPerChannel, kPerChannel, kSingle};

// Their addresses; null if absent.
template <size_t n>
using Addresses = std::array<void*, n>;

// Which of them are updated in place. Results are not listed: their memory is new.
constexpr std::array<size_t, 2> kWrittenForward = {0, 1};
constexpr std::array<size_t, 3> kWrittenBackward = {7, 8, 9};

int64_t bytes_of_kind(Kind kind, const NormCall& call) {
  switch (kind) {
    case kData: return call.outer * call.channels * call.inner * bytes_of(call.dtype);
    case kVector: return call.channels * (call.dtype == kFloat64 ? 8 : 4);
    case kMasked: return call.channels;
    case kPerChannel: return call.channels * int64_t{sizeof(float)};
    default: return sizeof(float);
  }
}

// Whether tensors that are updated in place share no memory with another tensor of the call.
template <size_t n, size_t m>
bool is_disjoint(const NormCall& call, const Addresses<5>& inputs, const Addresses<n>& own,
                 const std::array<Kind, n>& kinds, const std::array<size_t, m>& writes) {
  Spans written, read;
  for (size_t i = 0; i < inputs.size(); ++i)
    if (inputs[i] != nullptr) read.push_back(Span::of(inputs[i], bytes_of_kind(kInputs[i], call)));
  for (size_t i = 0; i < n; ++i) {
    if (own[i] == nullptr) continue;
    const bool is_written = std::find(writes.begin(), writes.end(), i) != writes.end();
    (is_written ? written : read).push_back(Span::of(own[i], bytes_of_kind(kinds[i], call)));
  }
  return !any_overlap(written, read);
}

// Reads the tensors of a call, if their memory layout is one that the kernels support.
class Reader {
 public:
  explicit Reader(py::handle x) : fits_(read_tensor(x.ptr(), kCpu, &x_) && find_dtype() && find_order()) {}

  NormCall call() const {
    NormCall call = {};
    call.dtype = dtype_;
    call.outer = outer_;
    call.channels = x_.shape[1];
    call.inner = inner_;
    return call;
  }

  template <size_t n>
  bool read(const py::tuple& tensors, const std::array<Kind, n>& kinds, Addresses<n>& addresses) const {
    bool fits = fits_ && tensors.size() == n;
    for (size_t i = 0; fits && i < n; ++i) {
      const py::handle object = tensors[i];
      DLTensor tensor = {};
      fits = object.is_none() || (read_tensor(object.ptr(), kCpu, &tensor) && is(kinds[i], tensor));
      addresses[i] = tensor.data;
    }
    return fits;
  }

 private:
  bool is(Kind kind, const DLTensor& tensor) const {
    switch (kind) {
      case kData: return is_like_x(tensor);
      case kVector: return is_array(tensor, x_.shape[1]) && has_dtype(tensor, dtype_ == kFloat64 ? kFloat64 : kFloat32);
      case kMasked: return is_array(tensor, x_.shape[1]) && has_dtype(tensor, kDLBool, 8);
      case kPerChannel: return is_array(tensor, x_.shape[1]) && has_dtype(tensor, kFloat32);
      default: return is_array(tensor, 1) && has_dtype(tensor, kFloat32);
    }
  }

  bool is_like_x(const DLTensor& tensor) const {
    if (tensor.ndim != x_.ndim || !has_dtype(tensor, dtype_)) return false;
    for (int32_t d = 0; d < x_.ndim; ++d) {
      // The stride of a dimension of size 1 has no meaning.
      if (tensor.shape[d] != x_.shape[d] || (x_.shape[d] != 1 && tensor.strides[d] != x_.strides[d])) return false;
    }
    return true;
  }

  static bool is_array(const DLTensor& tensor, int64_t size) {
    return tensor.ndim == 1 && tensor.shape[0] == size && is_contiguous(tensor);
  }

  bool find_dtype() {
    for (const Dtype known : {kFloat32, kFloat64, kBFloat16, kFloat16}) {
      dtype_ = known;
      if (has_dtype(x_, known)) return true;
    }
    return false;
  }

  // Channels last, else contiguous: the order of layout_of in sparsekern/kernels/backends/norm_layout.py.
  bool find_order() {
    const int64_t count = count_elements(x_);
    if (x_.ndim < 2 || count == 0) return false;
    const bool last = is_channels_last();
    inner_ = last ? 1 : count / (x_.shape[0] * x_.shape[1]);
    outer_ = count / (x_.shape[1] * inner_);
    return last || is_contiguous(x_);
  }

  bool is_channels_last() const {
    if (x_.ndim != 4 && x_.ndim != 5) return false;
    int64_t stride = 1;
    const auto is_next = [&](int32_t d) {
      const bool fits = x_.shape[d] == 1 || x_.strides[d] == stride;
      stride *= x_.shape[d];
      return fits;
    };
    bool fits = is_next(1);
    for (int32_t d = x_.ndim - 1; fits && d > 1; --d) fits = is_next(d);
    return fits && is_next(0);
  }

  DLTensor x_ = {};
  Dtype dtype_ = kFloat32;
  int64_t outer_ = 0, inner_ = 0;
  bool fits_;
};

bool complete(NormCall& call, const Addresses<5>& inputs, int activation, bool training, double eps) {
  if (activation < 0 || activation >= kActivations) throw py::value_error("activation: expected one of abi.h");
  call.activation = static_cast<Activation>(activation);
  call.training = training;
  call.eps = eps;
  call.x = inputs[0];
  call.residual = inputs[1];
  call.weight = inputs[2];
  call.bias = inputs[3];
  call.mask = static_cast<uint8_t*>(inputs[4]);
  return call.x != nullptr;
}

int run_forward(NormCall call, const Addresses<5>& inputs, const Addresses<5>& own, int activation, bool training,
                double eps, double momentum, int64_t threads) {
  const NormForward to = {own[0], own[1], momentum, own[2], own[3], own[4]};
  if (!complete(call, inputs, activation, training, eps) || !to.y || !to.mean || !to.var ||
      (momentum != 0 && (!to.running_mean || !to.running_var)))
    return kNullPointer;
  if (momentum != 0 && !is_disjoint(call, inputs, own, kForward, kWrittenForward)) return kMismatch;
  const py::gil_scoped_release release;
  return norm_act_forward(call, to, *runtime.kernels, runtime.parallel_for, threads);
}

int run_backward(NormCall call, const Addresses<5>& inputs, const Addresses<10>& own, int activation, bool training,
                 double eps, double tau, double decay, int64_t threads) {
  const auto floats = [&](size_t i) { return static_cast<float*>(own[i]); };
  const NormBackward to = {own[0], own[1],    own[2],    own[3],    own[4], own[5],
                           own[6], floats(7), floats(8), floats(9), tau,    decay};
  if (!complete(call, inputs, activation, training, eps) || !to.grad || !to.mean || !to.var || !to.grad_x ||
      !to.grad_weight || !to.grad_bias || (call.residual && !to.grad_residual) ||
      (to.threshold && (!to.activity || !to.updates)))
    return kNullPointer;
  if (to.threshold && !is_disjoint(call, inputs, own, kBackward, kWrittenBackward)) return kMismatch;
  const py::gil_scoped_release release;
  return norm_act_backward(call, to, *runtime.kernels, runtime.parallel_for, threads);
}

// Returns kMismatch, and does nothing, if the kernels do not support a tensor's memory layout or tensors share memory.
int forward(const py::tuple& inputs, const py::tuple& own, int activation, bool training, double eps, double momentum,
            int64_t threads) {
  const Reader reader(inputs[0]);
  Addresses<5> from, to;
  if (!reader.read(inputs, kInputs, from) || !reader.read(own, kForward, to)) return kMismatch;
  return run_forward(reader.call(), from, to, activation, training, eps, momentum, threads);
}

int backward(const py::tuple& inputs, const py::tuple& own, int activation, bool training, double eps, double tau,
             double decay, int64_t threads) {
  const Reader reader(inputs[0]);
  Addresses<5> from;
  Addresses<10> to;
  if (!reader.read(inputs, kInputs, from) || !reader.read(own, kBackward, to)) return kMismatch;
  return run_backward(reader.call(), from, to, activation, training, eps, tau, decay, threads);
}

// The same with addresses that Python read, of data in a layout that the kernels support. Each address comes with its
// number of bytes, so that an array that is too short is refused.
using Place = std::pair<uintptr_t, int64_t>;

NormCall make_call(int dtype, const std::array<int64_t, 3>& shape) {
  if (dtype < 0 || dtype >= kDtypes) throw py::value_error("dtype: expected one of abi.h");
  for (const int64_t size : shape)
    if (size < 1) throw py::value_error("shape: expected sizes of 1 and more");
  NormCall call = {};
  call.dtype = static_cast<Dtype>(dtype);
  call.outer = shape[0];
  call.channels = shape[1];
  call.inner = shape[2];
  return call;
}

template <size_t n>
Addresses<n> pointers(const std::array<Place, n>& places, const std::array<Kind, n>& kinds, const NormCall& call) {
  Addresses<n> found;
  for (size_t i = 0; i < n; ++i) {
    const auto& [address, bytes] = places[i];
    if (address != 0 && bytes < bytes_of_kind(kinds[i], call)) throw py::value_error("a tensor is too short");
    found[i] = reinterpret_cast<void*>(address);
  }
  return found;
}

int forward_at(int dtype, const std::array<int64_t, 3>& shape, const std::array<Place, 5>& inputs,
               const std::array<Place, 5>& own, int activation, bool training, double eps, double momentum,
               int64_t threads) {
  const NormCall call = make_call(dtype, shape);
  return run_forward(call, pointers(inputs, kInputs, call), pointers(own, kForward, call), activation, training, eps,
                     momentum, threads);
}

int backward_at(int dtype, const std::array<int64_t, 3>& shape, const std::array<Place, 5>& inputs,
                const std::array<Place, 10>& own, int activation, bool training, double eps, double tau, double decay,
                int64_t threads) {
  const NormCall call = make_call(dtype, shape);
  return run_backward(call, pointers(inputs, kInputs, call), pointers(own, kBackward, call), activation, training, eps,
                      tau, decay, threads);
}

}  // namespace

void define_norm(py::module_& module) {
  module.def("norm_forward", forward);
  module.def("norm_backward", backward);
  module.def("norm_forward_at", forward_at);
  module.def("norm_backward_at", backward_at);
}

}  // namespace sparsekern
