// What Python registers once per process (sparsekern/kernels/native/__init__.py): kernels, torch's thread pool and
// DLPack's exchange API. And functions that read address, sizes, strides and dtype of a tensor through that API.
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

// Registers the exchange API. `capsule` is torch.Tensor.__dlpack_c_exchange_api__; `types` is a tuple of the classes
// that it can read. Returns 1 if it was registered, 0 if its version is another one, -1 if a Python error is set.
int set_exchange(PyObject* capsule, PyObject* types);

struct Device {
  int32_t type, index;
};

constexpr Device kCpu = {kDLCPU, 0};

// Reads a plain dense tensor. False if `object` is anything else or no exchange API is registered.
bool read_tensor(PyObject* object, DLTensor* out);

// The same; also false if the tensor has no memory on `device`.
bool read_tensor(PyObject* object, Device device, DLTensor* out);

int64_t count_elements(const DLTensor& tensor);
bool is_contiguous(const DLTensor& tensor);
bool has_dtype(const DLTensor& tensor, uint8_t code, uint8_t bits);
bool has_dtype(const DLTensor& tensor, Dtype dtype);
int64_t bytes_of(Dtype dtype);

}  // namespace sparsekern
