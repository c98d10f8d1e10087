// The Python module. It turns lists of tensors into tables of addresses, compares the tensors with those that the plan
// was made for, and calls the kernels without the GIL. Python checks arguments when it makes a plan; this file compares
// what may have changed since then.
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
#include "overlap.h"
#include "runtime.h"
#include "sources.h"

namespace py = pybind11;

namespace sparsekern {
namespace {

constexpr int kMismatch = -1;

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

// Sizes and strides that the plan expects of a tensor.
struct TensorLayout {
  std::vector<int64_t> sizes, strides;
  int64_t bytes;  // dense, so that size in bytes and extent are the same

  bool matches(const DLTensor& tensor) const {
    if (tensor.ndim != static_cast<int32_t>(sizes.size())) return false;
    for (size_t d = 0; d < sizes.size(); ++d) {
      // The stride of a dimension of size 1 has no meaning.
      if (tensor.shape[d] != sizes[d] || (sizes[d] != 1 && tensor.strides[d] != strides[d])) return false;
    }
    return true;
  }
};

// What the plan expects of the tensors of a list.
struct ListLayout {
  Dtype dtype;
  std::vector<TensorLayout> layouts;
  int64_t table_rows;  // minimum number of rows of the flat arrays
  Device device;
  Disjoint disjoint[kOps] = {};  // addresses of the last call of each op
};

// A plan and the list that it was made for.
struct ListPlan {
  Plan plan;
  ListLayout list;
};

// The addresses of the tensors of a call, by slot.
using Addresses = std::vector<void*>[kSlots];

// Fills `addresses`. False if a tensor differs from what is expected.
bool read_lists(const ListLayout& expected, const py::tuple& lists, Addresses& addresses) {
  if (lists.size() > kSlots) return false;
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

// The flat arrays of a RowTable and their common number of rows.
struct Table {
  RowArrays arrays;
  int64_t rows;
};

// Reads a contiguous array of exactly this shape.
template <class T, size_t n>
bool read_exact(py::handle object, Device device, uint8_t code, const std::array<int64_t, n>& shape, T** out) {
  DLTensor tensor;
  if (!read_tensor(object.ptr(), &tensor) || tensor.device_type != device.type || tensor.device_id != device.index)
    return false;
  *out = static_cast<T*>(tensor.data);
  return has_dtype(tensor, code, sizeof(T) * 8) && is_contiguous(tensor) && tensor.ndim == int32_t{n} &&
         std::equal(shape.begin(), shape.end(), tensor.shape) &&
         (tensor.data != nullptr || count_elements(tensor) == 0);
}

// The length of an array; 0 for an object that is not a tensor, which no later check accepts.
int64_t length_of(py::handle object) {
  DLTensor tensor;
  return read_tensor(object.ptr(), &tensor) && tensor.ndim > 0 ? tensor.shape[0] : 0;
}

using Single = std::array<int64_t, 0>;
using Flat = std::array<int64_t, 1>;
using Quads = std::array<int64_t, 2>;

// Reads one array of a table: `per_row` numbers for each row, or a single number if `per_row` is 0.
template <int per_row, class T>
bool read_row_array(py::handle object, Device device, int64_t rows, T** out) {
  constexpr uint8_t kCode = std::is_floating_point_v<T> ? uint8_t{kDLFloat} : uint8_t{kDLInt};
  if constexpr (per_row == 0) return read_exact(object, device, kCode, Single{}, out);
  if constexpr (per_row == 1) return read_exact(object, device, kCode, Flat{rows}, out);
  return read_exact(object, device, kCode, Quads{rows, per_row}, out);
}

bool read_rows(const ListLayout& expected, const py::tuple& arrays, Table* table) {
  if (arrays.size() != kRowArrays) return false;
  table->rows = length_of(arrays[0]);
  bool fits = table->rows >= expected.table_rows;
  size_t i = 0;
#define SPARSEKERN_FIELD(Type, name, per_row) \
  fits = fits && read_row_array<per_row>(arrays[i++], expected.device, table->rows, &table->arrays.name);
  SPARSEKERN_ROW_ARRAYS(SPARSEKERN_FIELD)
#undef SPARSEKERN_FIELD
  return fits;
}

// The same, from addresses and numbers of elements.
bool read_rows_at(const ListLayout& expected, const std::vector<std::pair<uintptr_t, int64_t>>& arrays, Table* table) {
  if (arrays.size() != kRowArrays) return false;
  table->rows = arrays[0].second;
  bool fits = table->rows >= expected.table_rows;
  size_t i = 0;
#define SPARSEKERN_FIELD(Type, name, per_row)                               \
  fits = fits && arrays[i].second == (per_row ? table->rows * per_row : 1); \
  table->arrays.name = reinterpret_cast<Type*>(arrays[i++].first);
  SPARSEKERN_ROW_ARRAYS(SPARSEKERN_FIELD)
#undef SPARSEKERN_FIELD
  return fits;
}

// Whether memory that a call writes is disjoint from its other memory. Gradients are written only if they are scaled.
bool is_disjoint(ListLayout& list, int op, bool scaled, const Addresses& addresses, const Table& table) {
  Spans written, read;
  written.reserve(addresses[kParam].size() * kSlots);
  for (int slot = 0; slot < kSlots; ++slot) {
    const bool is_read = slot == kGrad ? !scaled : slot == kParam && op == kStatistics;
    for (size_t i = 0; i < addresses[slot].size(); ++i) {
      const int64_t bytes = slot == kStep ? sizeof(float) : list.layouts[i].bytes;
      (is_read ? read : written).push_back(Span::of(addresses[slot][i], bytes));
    }
  }
  if (const RowArrays& rows = table.arrays; rows.pending != nullptr) {
    const int64_t bytes = table.rows * sizeof(float);
    for (const void* array : {rows.penalty, rows.elements}) read.push_back(Span::of(array, bytes));
    for (const void* array :
         {static_cast<void*>(rows.countdown), static_cast<void*>(rows.threshold), static_cast<void*>(rows.activity)})
      written.push_back(Span::of(array, bytes));
    written.push_back(Span::of(rows.sums, bytes * 4));
    written.push_back(Span::of(rows.nonfinite, sizeof(int64_t)));
    written.push_back(Span::of(rows.pending, sizeof(float)));
  }
  return list.disjoint[op].holds(written, read);
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

bool none_is_null(const std::vector<void*>& addresses, size_t n) {
  if (addresses.size() != n) return false;
  for (const void* address : addresses)
    if (address == nullptr) return false;
  return true;
}

// Whether every address that the kernels will read is present.
bool complete(const ListPlan& plan, Op op, const Hyper& hyper, const Addresses& addresses, const RowArrays& rows) {
  const size_t n = plan.list.layouts.size();
  bool ok = none_is_null(addresses[kParam], n);
  if (op != kMask) ok = ok && none_is_null(addresses[kGrad], n);
  if (op == kAdam || (op == kSgd && hyper.momentum != 0)) ok = ok && none_is_null(addresses[kState0], n);
  if (op == kAdam) ok = ok && none_is_null(addresses[kState1], n) && none_is_null(addresses[kStep], n);
  if (op == kAdam && hyper.amsgrad) ok = ok && none_is_null(addresses[kState2], n);
  if (plan.plan.tracks()) {
#define SPARSEKERN_FIELD(Type, name, per_row) ok = ok && rows.name;
    SPARSEKERN_ROW_ARRAYS(SPARSEKERN_FIELD)
#undef SPARSEKERN_FIELD
  }
  return ok;
}

int run(ListPlan& plan, Op op, Addresses& addresses, const Table& table, const Hyper& hyper, bool update_statistics,
        int64_t threads) {
  if (!complete(plan, op, hyper, addresses, table.arrays)) return kNullPointer;
  if (!is_disjoint(plan.list, op, hyper.scaled, addresses, table)) return kMismatch;
  // The kernels index every list by tensor, including lists that they do not use.
  for (auto& list : addresses) list.resize(plan.list.layouts.size(), nullptr);
  Job job = {};
  for (int slot = 0; slot < kSlots; ++slot) job.addresses[slot] = addresses[slot].data();
  job.rows = table.arrays;
  job.hyper = hyper;
  job.statistics = update_statistics && op != kMask && plan.plan.tracks();
  job.fade = update_statistics && op != kStatistics;
  ++runtime.calls;
  const py::gil_scoped_release release;
  return plan.plan.run(job, *runtime.kernels, op, plan.list.dtype, runtime.parallel_for, threads);
}

Op checked(int op) {
  if (op < 0 || op >= kOps) throw py::value_error("op: expected one of abi.h");
  return static_cast<Op>(op);
}

// One step. Returns kMismatch, and does nothing, if a tensor differs from what the plan was made for or shares memory.
int step(ListPlan& plan, int op, const py::tuple& lists, const py::tuple& arrays, const py::tuple& hyper,
         bool update_statistics, int64_t threads) {
  Addresses addresses;
  Table table = {};
  if (!read_lists(plan.list, lists, addresses)) return kMismatch;
  if (plan.plan.tracks() && !read_rows(plan.list, arrays, &table)) return kMismatch;
  return run(plan, checked(op), addresses, table, read_hyper(hyper), update_statistics, threads);
}

// The same with addresses that Python read and compared; arrays come with their numbers of elements.
int step_at(ListPlan& plan, int op, const std::vector<std::vector<uintptr_t>>& lists,
            const std::vector<std::pair<uintptr_t, int64_t>>& arrays, const py::tuple& hyper, bool update_statistics,
            int64_t threads) {
  if (lists.size() > kSlots) throw py::value_error("lists: expected six at most");
  Addresses addresses;
  for (size_t slot = 0; slot < lists.size(); ++slot)
    for (const uintptr_t address : lists[slot]) addresses[slot].push_back(reinterpret_cast<void*>(address));
  Table table = {};
  if (plan.plan.tracks() && !read_rows_at(plan.list, arrays, &table)) return kMismatch;
  return run(plan, checked(op), addresses, table, read_hyper(hyper), update_statistics, threads);
}

Spans written_spans(const ChannelArrays& channel) {
  const int64_t bytes = channel.channels * sizeof(float);
  return {Span::of(channel.sums, channel.rows * 4 * sizeof(float)), Span::of(channel.dot, bytes),
          Span::of(channel.dot_sq, bytes), Span::of(channel.updates, sizeof(float)),
          Span::of(channel.pending, sizeof(float))};
}

Spans read_spans(const ChannelArrays& channel) {
  return {Span::of(channel.gate_offsets, (channel.channels + 1) * sizeof(int64_t)),
          Span::of(channel.gate_rows, channel.gates * sizeof(int64_t))};
}

// Updates the means per channel. False, and nothing is done, if an array is not as expected or shares memory with one
// that is written, or if a gate is not a row of the table.
bool step_channels(const py::tuple& arrays, double decay) {
  if (arrays.size() != 7) return false;
  ChannelArrays channel = {};
  channel.gates = length_of(arrays[1]);
  channel.rows = length_of(arrays[2]);
  channel.channels = length_of(arrays[3]);
  const Flat per_channel = {channel.channels};
  const bool ok = read_exact(arrays[0], kCpu, kDLInt, Flat{channel.channels + 1}, &channel.gate_offsets) &&
                  read_exact(arrays[1], kCpu, kDLInt, Flat{channel.gates}, &channel.gate_rows) &&
                  read_exact(arrays[2], kCpu, kDLFloat, Quads{channel.rows, 4}, &channel.sums) &&
                  read_exact(arrays[3], kCpu, kDLFloat, per_channel, &channel.dot) &&
                  read_exact(arrays[4], kCpu, kDLFloat, per_channel, &channel.dot_sq) &&
                  read_exact(arrays[5], kCpu, kDLFloat, Single{}, &channel.updates) &&
                  read_exact(arrays[6], kCpu, kDLFloat, Single{}, &channel.pending);
  if (!ok || any_overlap(written_spans(channel), read_spans(channel)) || !gates_fit(channel)) return false;
  const py::gil_scoped_release release;
  channel_moments(channel, decay);
  return true;
}

using Layouts = std::vector<std::pair<std::vector<int64_t>, std::vector<int64_t>>>;  // (sizes, strides) per tensor

ListLayout make_layout(int dtype, const Layouts& layouts, int64_t table_rows, Device device) {
  if (dtype < 0 || dtype >= kDtypes) throw py::value_error("dtype: expected one of abi.h");
  ListLayout list = {static_cast<Dtype>(dtype), {}, table_rows, device, {}};
  for (const auto& [sizes, strides] : layouts) {
    int64_t bytes = bytes_of(list.dtype);
    for (const int64_t size : sizes) bytes *= size;
    list.layouts.push_back({sizes, strides, bytes});
  }
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
  if (cut.size() != layouts.size()) throw py::value_error("plan: lengths differ");
  return {Plan(std::move(cut)), make_layout(dtype, layouts, table_rows, kCpu)};
}

// For kernels of other libraries, which Python calls: the addresses of all lists, [kSlots][tensors], then those of the
// flat arrays, null if absent. Returns None if a tensor differs from what is expected or shares memory.
py::object addresses_of(ListLayout& expected, const py::tuple& lists, const py::tuple& arrays, int op, bool scaled) {
  Addresses addresses;
  Table table = {};
  if (!read_lists(expected, lists, addresses)) return py::none();
  if (!arrays.empty() && !read_rows(expected, arrays, &table)) return py::none();
  if (!is_disjoint(expected, checked(op), scaled, addresses, table)) return py::none();
  const RowArrays& rows = table.arrays;
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
