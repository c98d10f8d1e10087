// What the process hands over once (sparsekern/kernels/native/__init__.py), and tensors read by it: where they lie, and as what.
#pragma once

#include <Python.h>

#include <string>
#include <vector>

#include "abi.h"
#include "cpu/parallel.h"
#include "exchange.h"

namespace sparsekern {

struct Runtime {
  const Kernels* kernels = nullptr;
  std::string isa;
  ParallelFor parallel_for = nullptr;
  const DLPackExchangeAPI* exchange = nullptr;
  std::vector<PyTypeObject*> tensor_types;
  int64_t calls = 0;
};

extern Runtime runtime;

// `capsule`: torch.Tensor.__dlpack_c_exchange_api__; `types`: a tuple of the classes whose instances it may be asked
// about. 1 when it is taken, 0 when it is of another kind, -1 when a Python error is set.
int set_exchange(PyObject* capsule, PyObject* types);

struct Device {
  int32_t type, index;
};

constexpr Device kCpu = {kDLCPU, 0};

// Reads a plain dense tensor. False when `object` is anything else, or when this torch offers no such reading.
bool read_tensor(PyObject* object, DLTensor* out);

// The same of a tensor that has memory on `device`.
bool read_tensor(PyObject* object, Device device, DLTensor* out);

int64_t count_elements(const DLTensor& tensor);
bool is_contiguous(const DLTensor& tensor);
bool has_dtype(const DLTensor& tensor, uint8_t code, uint8_t bits);
bool has_dtype(const DLTensor& tensor, Dtype dtype);
int64_t bytes_of(Dtype dtype);

}  // namespace sparsekern
