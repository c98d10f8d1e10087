// The C structs of DLPack 1.x that describe a tensor. torch 2.10 and later fills them without a call into Python:
// address, sizes and strides of a tensor take 5 ns instead of 500 ns.
#pragma once

#include <stdint.h>

namespace sparsekern {

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

constexpr int32_t kDLCPU = 1;
constexpr uint8_t kDLFloat = 2, kDLInt = 0, kDLBFloat = 4, kDLBool = 6;

struct DLPackExchangeAPI {
  uint32_t major, minor;
  DLPackExchangeAPI* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*dltensor_from_py_object)(void* py_object, DLTensor* out);  // borrowed; nonzero if a Python error is set
  void* current_work_stream;
};

}  // namespace sparsekern
