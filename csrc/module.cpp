// The Python module. It turns lists of tensors into tables of addresses, compares them with what the plan was made
// for, and calls the kernels without the GIL. Arguments are checked in Python; what is compared here is what could have
// changed since then.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "abi.h"
#include "cpu/dispatch.h"
#include "cpu/moments.h"
#include "cpu/plan.h"
#include "norm_module.h"
#include "runtime.h"
#include "sources.h"

namespace py = pybind11;

namespace sparsekern {
namespace {

#define SPARSEKERN_FIELD(Type, name) #name,
constexpr std::array kHyperNames = {SPARSEKERN_HYPER(SPARSEKERN_FIELD)};
#undef SPARSEKERN_FIELD

#define SPARSEKERN_FIELD(Type, name, per_row) #name,
constexpr std::array kRowArrayNames = {SPARSEKERN_ROW_ARRAYS(SPARSEKERN_FIELD)};
#undef SPARSEKERN_FIELD
constexpr size_t kRowArrays = kRowArrayNames.size();

template <size_t n>
py::tuple names_of(const std::array<const char*, n>& names) {
  py::tuple result(n);
  for (size_t i = 0; i < n; ++i) result[i] = py::str(names[i]);
  return result;
}

// Sizes and strides of a tensor, as the plan expects them.
struct Layout {
  std::vector<int64_t> sizes, strides;

  bool matches(const DLTensor& tensor) const {
    if (tensor.ndim != static_cast<int32_t>(sizes.size())) return false;
    for (size_t d = 0; d < sizes.size(); ++d) {
      // The stride of a dimension of one element says nothing.
      if (tensor.shape[d] != sizes[d] || (sizes[d] != 1 && tensor.strides[d] != strides[d])) return false;
    }
    return true;
  }
};

// What the tensors of a list have to be.
struct ListLayout {
  Dtype dtype;
  std::vector<Layout> layouts;
  int64_t table_rows;  // rows that the flat arrays must have at least
  Device device;
};

// A plan with the list for which it holds.
struct ListPlan {
  Plan plan;
  ListLayout list;
};

// The addresses of all lists of a call.
using Addresses = std::vector<void*>[kSlots];

// False when a tensor is not what is expected.
bool read_lists(const ListLayout& expected, const py::tuple& lists, Addresses& addresses) {
  for (size_t slot = 0; slot < lists.size(); ++slot) {
    const auto list = py::reinterpret_steal<py::object>(PySequence_Fast(lists[slot].ptr(), "lists: not a sequence"));
    if (!list) throw py::error_already_set();
    const auto n = static_cast<size_t>(PySequence_Fast_GET_SIZE(list.ptr()));
    if (n == 0) continue;
    if (n != expected.layouts.size()) return false;
    addresses[slot].resize(n);
    for (size_t i = 0; i < n; ++i) {
      DLTensor tensor;
      if (!read_tensor(PySequence_Fast_GET_ITEM(list.ptr(), i), expected.device, &tensor)) return false;
      const bool fits = slot == kStep ? has_dtype(tensor, kDLFloat, 32) && count_elements(tensor) == 1
                                      : has_dtype(tensor, expected.dtype) && expected.layouts[i].matches(tensor);
      if (!fits) return false;
      addresses[slot][i] = tensor.data;
    }
  }
  return true;
}

template <class T>
constexpr uint8_t kDLCode = std::is_floating_point_v<T> ? uint8_t{kDLFloat} : uint8_t{kDLInt};

// One flat array of a RowTable: contiguous, of at least `least` elements.
template <class T>
bool read_array(py::handle object, Device device, int64_t least, T** out) {
  DLTensor tensor;
  if (!read_tensor(object.ptr(), device, &tensor)) return false;
  *out = static_cast<T*>(tensor.data);
  return has_dtype(tensor, kDLCode<T>, sizeof(T) * 8) && count_elements(tensor) >= least && is_contiguous(tensor);
}

bool read_rows(const ListLayout& expected, const py::tuple& arrays, RowArrays* rows) {
  size_t i = 0;
  bool fits = arrays.size() == kRowArrays;
#define SPARSEKERN_FIELD(Type, name, per_row) \
  fits = fits && read_array(arrays[i++], expected.device, per_row ? expected.table_rows * per_row : 1, &rows->name);
  SPARSEKERN_ROW_ARRAYS(SPARSEKERN_FIELD)
#undef SPARSEKERN_FIELD
  return fits;
}

// Of addresses in the order of abi.h.
RowArrays rows_at(const std::vector<uintptr_t>& addresses) {
  if (addresses.size() != kRowArrays) throw py::value_error("arrays: expected an address for each of ROW_ARRAYS");
  RowArrays rows;
  size_t i = 0;
#define SPARSEKERN_FIELD(Type, name, per_row) rows.name = reinterpret_cast<Type*>(addresses[i++]);
  SPARSEKERN_ROW_ARRAYS(SPARSEKERN_FIELD)
#undef SPARSEKERN_FIELD
  return rows;
}

Hyper read_hyper(const py::tuple& values) {
  if (values.size() != kHyperNames.size()) throw py::value_error("hyper: expected a number for each of HYPER");
  Hyper hyper;
  size_t i = 0;
#define SPARSEKERN_FIELD(Type, name) hyper.name = static_cast<Type>(values[i++].cast<double>());
  SPARSEKERN_HYPER(SPARSEKERN_FIELD)
#undef SPARSEKERN_FIELD
  return hyper;
}

bool all_there(const std::vector<void*>& addresses, size_t n) {
  if (addresses.size() != n) return false;
  for (const void* address : addresses)
    if (address == nullptr) return false;
  return true;
}

// Whether every address that the kernels will follow was given.
bool complete(const ListPlan& plan, Op op, const Hyper& hyper, const Addresses& addresses, const RowArrays& rows) {
  const size_t n = plan.list.layouts.size();
  bool ok = all_there(addresses[kParam], n);
  if (op != kMask) ok = ok && all_there(addresses[kGrad], n);
  if (op == kAdam || (op == kSgd && hyper.momentum != 0)) ok = ok && all_there(addresses[kState0], n);
  if (op == kAdam) ok = ok && all_there(addresses[kState1], n) && all_there(addresses[kStep], n);
  if (op == kAdam && hyper.amsgrad) ok = ok && all_there(addresses[kState2], n);
  if (plan.plan.tracks()) {
#define SPARSEKERN_FIELD(Type, name, per_row) ok = ok && rows.name;
    SPARSEKERN_ROW_ARRAYS(SPARSEKERN_FIELD)
#undef SPARSEKERN_FIELD
  }
  return ok;
}

int run(const ListPlan& plan, Op op, Addresses& addresses, const RowArrays& rows, const Hyper& hyper,
        bool update_statistics, int64_t threads) {
  if (!complete(plan, op, hyper, addresses, rows)) return kNullPointer;
  // The kernels index every list by tensor, also those that they then leave alone.
  for (auto& list : addresses) list.resize(plan.list.layouts.size(), nullptr);
  Job job = {};
  for (int slot = 0; slot < kSlots; ++slot) job.addresses[slot] = addresses[slot].data();
  job.rows = rows;
  job.hyper = hyper;
  job.statistics = update_statistics && op != kMask && plan.plan.tracks();
  job.fade = update_statistics && op != kStatistics;
  ++runtime.calls;
  const py::gil_scoped_release release;
  return plan.plan.run(job, *runtime.kernels, op, plan.list.dtype, runtime.parallel_for, threads);
}

// -1: a tensor is not what the plan was made for, and nothing has been done.
int step(const ListPlan& plan, int op, const py::tuple& lists, const py::tuple& arrays, const py::tuple& hyper,
         bool update_statistics, int64_t threads) {
  Addresses addresses;
  RowArrays rows = {};
  if (!read_lists(plan.list, lists, addresses)) return -1;
  if (plan.plan.tracks() && !read_rows(plan.list, arrays, &rows)) return -1;
  return run(plan, static_cast<Op>(op), addresses, rows, read_hyper(hyper), update_statistics, threads);
}

// The same with addresses that Python read and compared.
int step_at(const ListPlan& plan, int op, const std::vector<std::vector<uintptr_t>>& lists,
            const std::vector<uintptr_t>& arrays, const py::tuple& hyper, bool update_statistics, int64_t threads) {
  Addresses addresses;
  for (size_t slot = 0; slot < lists.size(); ++slot)
    for (const uintptr_t address : lists[slot]) addresses[slot].push_back(reinterpret_cast<void*>(address));
  RowArrays rows = {};
  if (!arrays.empty()) rows = rows_at(arrays);
  return run(plan, static_cast<Op>(op), addresses, rows, read_hyper(hyper), update_statistics, threads);
}

// One array of the channels: contiguous and of exactly this shape.
template <class T, size_t n>
bool read_exact(py::handle object, uint8_t code, const std::array<int64_t, n>& shape, T** out) {
  DLTensor tensor;
  if (!read_tensor(object.ptr(), &tensor) || tensor.device_type != kDLCPU) return false;
  *out = static_cast<T*>(tensor.data);
  return has_dtype(tensor, code, sizeof(T) * 8) && is_contiguous(tensor) && tensor.ndim == int32_t{n} &&
         std::equal(shape.begin(), shape.end(), tensor.shape);
}

// How long an array is; 0 for what is no tensor, which does not fit afterwards.
int64_t length_of(py::handle object) {
  DLTensor tensor;
  return read_tensor(object.ptr(), &tensor) && tensor.ndim > 0 ? tensor.shape[0] : 0;
}

// False: an array is not what it should be or a gate is no row, and nothing has been done.
bool step_channels(const py::tuple& arrays, double decay) {
  ChannelArrays channel = {};
  channel.gates = length_of(arrays[1]);
  channel.rows = length_of(arrays[2]);
  channel.channels = length_of(arrays[3]);
  using Single = std::array<int64_t, 0>;
  using Flat = std::array<int64_t, 1>;
  const Flat per_channel = {channel.channels};
  const bool ok = read_exact(arrays[0], kDLInt, Flat{channel.channels + 1}, &channel.gate_offsets) &&
                  read_exact(arrays[1], kDLInt, Flat{channel.gates}, &channel.gate_rows) &&
                  read_exact(arrays[2], kDLFloat, std::array<int64_t, 2>{channel.rows, 4}, &channel.sums) &&
                  read_exact(arrays[3], kDLFloat, per_channel, &channel.dot) &&
                  read_exact(arrays[4], kDLFloat, per_channel, &channel.dot_sq) &&
                  read_exact(arrays[5], kDLFloat, Single{}, &channel.updates) &&
                  read_exact(arrays[6], kDLFloat, Single{}, &channel.pending);
  if (!ok || !gates_fit(channel)) return false;
  const py::gil_scoped_release release;
  channel_moments(channel, decay);
  return true;
}

using Layouts = std::vector<std::pair<std::vector<int64_t>, std::vector<int64_t>>>;  // (sizes, strides) per tensor

ListLayout make_layout(int dtype, const Layouts& layouts, int64_t table_rows, Device device) {
  if (dtype < 0 || dtype >= kDtypes) throw py::value_error("dtype: expected one of abi.h");
  ListLayout list = {static_cast<Dtype>(dtype), {}, table_rows, device};
  for (const auto& [sizes, strides] : layouts) list.layouts.push_back({sizes, strides});
  return list;
}

// shapes: (outer, rows, inner, start) per tensor.
ListPlan make_plan(int dtype, const Layouts& layouts, const std::vector<std::array<int64_t, 4>>& shapes) {
  std::vector<Shape> cut;
  int64_t table_rows = 0;
  for (const auto& [outer, rows, inner, start] : shapes) {
    if (outer < 1 || rows < 1 || inner < 1) throw py::value_error("shapes: expected sizes of 1 and more");
    cut.push_back({outer, rows, inner, start});
    if (start >= 0) table_rows = std::max(table_rows, start + rows);
  }
  if (cut.size() != layouts.size() || dtype == kFloat16) throw py::value_error("plan: lengths or dtypes differ");
  return {Plan(std::move(cut)), make_layout(dtype, layouts, table_rows, kCpu)};
}

// For kernels elsewhere, which Python calls by itself: the addresses of all lists, [kSlots][tensors], and then of the
// flat arrays, null where there are none. None: a tensor is not what is expected.
py::object addresses_of(const ListLayout& expected, const py::tuple& lists, const py::tuple& arrays) {
  Addresses addresses;
  RowArrays rows = {};
  if (!read_lists(expected, lists, addresses)) return py::none();
  if (!arrays.empty() && !read_rows(expected, arrays, &rows)) return py::none();
  std::vector<const void*> all;
  for (auto& list : addresses) {
    list.resize(expected.layouts.size(), nullptr);
    all.insert(all.end(), list.begin(), list.end());
  }
#define SPARSEKERN_FIELD(Type, name, per_row) all.push_back(rows.name);
  SPARSEKERN_ROW_ARRAYS(SPARSEKERN_FIELD)
#undef SPARSEKERN_FIELD
  return py::bytes(reinterpret_cast<const char*>(all.data()), all.size() * sizeof(void*));
}

std::string select_isa(const std::string& name) {
  runtime.kernels = &choose_kernels(name, runtime.isa);
  return runtime.isa;
}

void set_parallel_for(uintptr_t address) {
  runtime.parallel_for = reinterpret_cast<ParallelFor>(address);
}

}  // namespace
}  // namespace sparsekern

PYBIND11_MODULE(_C, module) {
  using namespace sparsekern;
  py::class_<ListPlan>(module, "Plan", py::module_local());
  py::class_<ListLayout>(module, "ListLayout", py::module_local());
  module.def("plan", make_plan);
  module.def("layout", [](int dtype, const Layouts& layouts, int64_t table_rows, int32_t type, int32_t index) {
    return make_layout(dtype, layouts, table_rows, {type, index});
  });
  module.attr("HYPER") = names_of(kHyperNames);
  module.attr("ROW_ARRAYS") = names_of(kRowArrayNames);
  module.def("addresses", addresses_of);
  module.def("step", step);
  module.def("step_at", step_at);
  module.def("step_channels", step_channels);
  define_norm(module);
  define_sources(module);
  module.def("select_isa", select_isa);
  module.def("isa", [] { return runtime.isa; });
  module.def("call_count", [] { return runtime.calls; });
  module.def("set_parallel_for", set_parallel_for);
  module.def("set_exchange", [](const py::object& capsule, const py::tuple& types) {
    const int taken = set_exchange(capsule.ptr(), types.ptr());
    if (taken < 0) throw py::error_already_set();
    return taken == 1;
  });
}
