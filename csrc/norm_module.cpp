#include "norm_module.h"

#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "cpu/norm_act.h"
#include "runtime.h"

namespace py = pybind11;

namespace sparsekern {
namespace {

constexpr int kMisfit = -1;

// What a tensor of a call is: data like x, a vector of a number per channel in the compute type, or the mask and the
// arrays of the counts.
enum Kind { kData, kVector, kMasked, kPerChannel, kSingle };

// The tensors of a call by the names of the fields of NormCall, NormForward and NormBackward.
constexpr std::array<Kind, 5> kInputs = {kData, kData, kVector, kVector, kMasked};
constexpr std::array<Kind, 5> kForward = {kVector, kVector, kData, kVector, kVector};
constexpr std::array<Kind, 10> kBackward = {kData,   kVector, kVector,     kData,       kData,
                                            kVector, kVector, kPerChannel, kPerChannel, kSingle};

// Their addresses; null for what there is not.
template <size_t n>
using Addresses = std::array<void*, n>;

// Reads the tensors of a call where they lie as the kernels walk them.
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
      // The stride of a dimension of one element says nothing.
      if (tensor.shape[d] != x_.shape[d] || (x_.shape[d] != 1 && tensor.strides[d] != x_.strides[d])) return false;
    }
    return true;
  }

  static bool is_array(const DLTensor& tensor, int64_t size) {
    return tensor.ndim == 1 && tensor.shape[0] == size && is_contiguous(tensor);
  }

  bool find_dtype() {
    for (const Dtype known : {kFloat32, kFloat64, kBFloat16}) {
      dtype_ = known;
      if (has_dtype(x_, known)) return true;
    }
    return false;
  }

  // Channels last or else contiguous, as layout_of in sparsekern/backends/_norm_layout.py has it.
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
  const py::gil_scoped_release release;
  return norm_act_backward(call, to, *runtime.kernels, runtime.parallel_for, threads);
}

// kMisfit: a tensor is not what the kernels walk as it lies, and nothing has been done.
int forward(const py::tuple& inputs, const py::tuple& own, int activation, bool training, double eps, double momentum,
            int64_t threads) {
  const Reader reader(inputs[0]);
  Addresses<5> from, to;
  if (!reader.read(inputs, kInputs, from) || !reader.read(own, kForward, to)) return kMisfit;
  return run_forward(reader.call(), from, to, activation, training, eps, momentum, threads);
}

int backward(const py::tuple& inputs, const py::tuple& own, int activation, bool training, double eps, double tau,
             double decay, int64_t threads) {
  const Reader reader(inputs[0]);
  Addresses<5> from;
  Addresses<10> to;
  if (!reader.read(inputs, kInputs, from) || !reader.read(own, kBackward, to)) return kMisfit;
  return run_backward(reader.call(), from, to, activation, training, eps, tau, decay, threads);
}

// The same with addresses that Python read, of data that lies as the other two would have it.
NormCall make_call(int dtype, const std::array<int64_t, 3>& shape) {
  if (dtype < 0 || dtype >= kDtypes || dtype == kFloat16) throw py::value_error("dtype: the CPU has no kernels for it");
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
Addresses<n> pointers(const std::array<uintptr_t, n>& numbers) {
  Addresses<n> found;
  for (size_t i = 0; i < n; ++i) found[i] = reinterpret_cast<void*>(numbers[i]);
  return found;
}

int forward_at(int dtype, const std::array<int64_t, 3>& shape, const std::array<uintptr_t, 5>& inputs,
               const std::array<uintptr_t, 5>& own, int activation, bool training, double eps, double momentum,
               int64_t threads) {
  return run_forward(make_call(dtype, shape), pointers(inputs), pointers(own), activation, training, eps, momentum,
                     threads);
}

int backward_at(int dtype, const std::array<int64_t, 3>& shape, const std::array<uintptr_t, 5>& inputs,
                const std::array<uintptr_t, 10>& own, int activation, bool training, double eps, double tau,
                double decay, int64_t threads) {
  return run_backward(make_call(dtype, shape), pointers(inputs), pointers(own), activation, training, eps, tau, decay,
                      threads);
}

}  // namespace

void define_norm(py::module_& module) {
  module.def("norm_forward", forward);
  module.def("norm_backward", backward);
  module.def("norm_forward_at", forward_at);
  module.def("norm_backward_at", backward_at);
}

}  // namespace sparsekern
