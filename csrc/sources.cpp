#include "sources.h"

#include <cstdint>
#include <utility>
#include <vector>

#include "runtime.h"

namespace py = pybind11;

namespace sparsekern {
namespace {

// The scalar type of a gradient, in DLPack's numbers.
struct Type {
  uint8_t code, bits;

  bool operator==(const Type& other) const { return code == other.code && bits == other.bits; }
};

bool read_type(PyObject* grad, Type* type) {
  DLTensor tensor;
  if (!read_tensor(grad, &tensor)) return false;
  *type = {tensor.type_code, tensor.type_bits};
  return true;
}

// The identity of everything that the lists of a step were made from: the parameters, which of them have a gradient and
// of which type, and the state. The caller keeps the objects alive (`held`). A reference from here would be invisible
// to Python's garbage collector, and a parameter may refer to its optimizer.
class Sources {
 public:
  // Returns the existing gradients in order, or None if anything differs or a gradient is not a plain dense tensor.
  py::object grads(const py::list& groups, py::handle state) const {
    py::list found(with_grad_);
    size_t at = 0;
    Py_ssize_t with_grad = 0;
    if (groups.size() != sizes_.size() || !same_state(state)) return py::none();
    for (size_t g = 0; g < sizes_.size(); ++g) {
      const py::object params = params_of(groups[g]);
      if (!params || PyList_GET_SIZE(params.ptr()) != sizes_[g]) return py::none();
      for (Py_ssize_t i = 0; i < sizes_[g]; ++i, ++at) {
        if (i >= PyList_GET_SIZE(params.ptr())) return py::none();
        PyObject* param = PyList_GET_ITEM(params.ptr(), i);
        if (param != params_[at].object) return py::none();
        py::object grad = grad_of(param);
        if (grad.is_none() != !params_[at].has_grad) return py::none();
        if (grad.is_none()) continue;
        Type type;
        if (!read_type(grad.ptr(), &type) || !(type == params_[at].type)) return py::none();
        PyList_SET_ITEM(found.ptr(), with_grad++, grad.release().ptr());
      }
    }
    return std::move(found);
  }

  // Records the present objects. False if a gradient is not a plain dense tensor; the record is then unusable.
  bool record(const py::list& groups, py::handle state, py::list& held) {
    for (const py::handle group : groups) {
      const py::object params = params_of(group);
      if (!params) return false;
      sizes_.push_back(PyList_GET_SIZE(params.ptr()));
      for (const py::handle param : params) {
        const py::object grad = grad_of(param.ptr());
        Source source = {param.ptr(), !grad.is_none(), {}};
        if (source.has_grad && !read_type(grad.ptr(), &source.type)) return false;
        params_.push_back(source);
        with_grad_ += source.has_grad;
        held.append(param);
      }
    }
    if (!PyDict_Check(state.ptr())) return false;
    Items items(state.ptr());
    while (PyObject* value = items.next()) {
      const bool is_dict = PyDict_Check(value);
      states_.push_back({value, is_dict ? PyDict_GET_SIZE(value) : -1});
      held.append(py::handle(value));
      if (!is_dict) continue;
      Items inner(value);
      while (PyObject* part = inner.next()) {
        values_.push_back(part);
        held.append(py::handle(part));
      }
    }
    return true;
  }

 private:
  struct Source {
    PyObject* object;
    bool has_grad;
    Type type;
  };

  // The state of a parameter and its number of values, or -1 if it is not a dict.
  struct State {
    PyObject* object;
    Py_ssize_t size;
  };

  // Iterates over the values of a dict; null at the end.
  class Items {
   public:
    explicit Items(PyObject* dict) : dict_(dict) {}
    PyObject* next() {
      PyObject* value = nullptr;
      return PyDict_Next(dict_, &position_, nullptr, &value) ? value : nullptr;
    }

   private:
    PyObject* dict_;
    Py_ssize_t position_ = 0;
  };

  // The parameters of a group, or null if they are not in a list.
  static py::object params_of(py::handle group) {
    py::object params = group["params"];
    return PyList_Check(params.ptr()) ? params : py::object();
  }

  static py::object grad_of(PyObject* param) {
    static PyObject* const name = PyUnicode_InternFromString("grad");
    PyObject* grad = PyObject_GetAttr(param, name);
    if (grad == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(grad);
  }

  bool same_state(py::handle state) const {
    if (!PyDict_Check(state.ptr()) || PyDict_GET_SIZE(state.ptr()) != static_cast<Py_ssize_t>(states_.size()))
      return false;
    Items items(state.ptr());
    size_t at = 0;
    for (const State& known : states_) {
      if (items.next() != known.object) return false;
      if (known.size < 0) continue;
      if (PyDict_GET_SIZE(known.object) != known.size) return false;
      Items inner(known.object);
      for (Py_ssize_t i = 0; i < known.size; ++i)
        if (inner.next() != values_[at++]) return false;
    }
    return true;
  }

  std::vector<Py_ssize_t> sizes_;  // parameters of each group
  std::vector<Source> params_;
  std::vector<State> states_;
  std::vector<PyObject*> values_;
  size_t with_grad_ = 0;
};

// A key for a sequence of objects: the bytes of their addresses.
py::bytes identities(const py::handle& objects) {
  const auto list = py::reinterpret_steal<py::object>(PySequence_Fast(objects.ptr(), "objects: not a sequence"));
  if (!list) throw py::error_already_set();
  const auto bytes = static_cast<size_t>(PySequence_Fast_GET_SIZE(list.ptr())) * sizeof(PyObject*);
  return py::bytes(reinterpret_cast<const char*>(PySequence_Fast_ITEMS(list.ptr())), bytes);
}

}  // namespace

void define_sources(py::module_& module) {
  py::class_<Sources>(module, "Sources", py::module_local()).def("grads", &Sources::grads);
  module.def("sources", [](const py::list& groups, py::handle state, py::list held) -> py::object {
    Sources sources;
    if (!sources.record(groups, state, held)) return py::none();
    return py::cast(std::move(sources));
  });
  module.def("identities", identities);
}

}  // namespace sparsekern
