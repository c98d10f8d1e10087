#include "runtime.h"

namespace sparsekern {

Runtime runtime;

int set_exchange(PyObject* capsule, PyObject* types) {
  void* pointer = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  if (pointer == nullptr) return -1;
  const auto* api = static_cast<const DLPackExchangeAPI*>(pointer);
  if (api->major != 1 || api->dltensor_from_py_object == nullptr) return 0;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(types); ++i)
    runtime.tensor_types.push_back(reinterpret_cast<PyTypeObject*>(PyTuple_GET_ITEM(types, i)));
  runtime.exchange = api;
  return 1;
}

bool read_tensor(PyObject* object, DLTensor* out) {
  bool known = false;
  for (PyTypeObject* type : runtime.tensor_types) known = known || Py_TYPE(object) == type;
  if (!known || runtime.exchange == nullptr) return false;
  if (runtime.exchange->dltensor_from_py_object(object, out) != 0) {
    PyErr_Clear();
    return false;
  }
  out->data = static_cast<char*>(out->data) + out->byte_offset;
  return true;
}

bool read_tensor(PyObject* object, Device device, DLTensor* out) {
  if (!read_tensor(object, out)) return false;
  return out->device_type == device.type && out->device_id == device.index && out->data != nullptr;
}

int64_t count_elements(const DLTensor& tensor) {
  int64_t count = 1;
  for (int32_t d = 0; d < tensor.ndim; ++d) count *= tensor.shape[d];
  return count;
}

bool is_contiguous(const DLTensor& tensor) {
  // The strides of an array without elements have no meaning.
  if (count_elements(tensor) == 0) return true;
  int64_t stride = 1;
  for (int32_t d = tensor.ndim - 1; d >= 0; --d) {
    if (tensor.shape[d] != 1 && tensor.strides[d] != stride) return false;
    stride *= tensor.shape[d];
  }
  return true;
}

bool has_dtype(const DLTensor& tensor, uint8_t code, uint8_t bits) {
  return tensor.type_code == code && tensor.type_bits == bits && tensor.type_lanes == 1;
}

bool has_dtype(const DLTensor& tensor, Dtype dtype) {
  switch (dtype) {
    case kFloat32: return has_dtype(tensor, kDLFloat, 32);
    case kFloat64: return has_dtype(tensor, kDLFloat, 64);
    case kFloat16: return has_dtype(tensor, kDLFloat, 16);
    default: return has_dtype(tensor, kDLBFloat, 16);
  }
}

int64_t bytes_of(Dtype dtype) {
  if (dtype == kFloat64) return 8;
  return dtype == kFloat32 ? 4 : 2;
}

}  // namespace sparsekern
