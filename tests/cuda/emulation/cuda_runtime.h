// CUDA for machines without a GPU: enough of it to compile the kernels of csrc/cuda with a C++ compiler and run them.
//
// Blocks run one after the other, the threads of a block as fibers that are switched where threads meet (barriers and
// shuffles). Threads that wait for others that never come, and accesses that are not aligned as promised, are found.
// Shared memory holds NaN when a block starts. The order of blocks and threads can be changed: a result that depends
// on it is a race. races/ runs the same with ThreadSanitizer.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "fibers.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Arguments of a kernel are constant and the same for all threads.
#define __grid_constant__ &
// One copy per variable, as blocks take turns; shared.ld collects them, so that they can be filled.
#define __shared__ __attribute__((section("emulated_shared"))) static
#define __builtin_assume_aligned(address, bytes) emulation::aligned(address, bytes)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1) : x(x), y(1), z(1) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

#define threadIdx (emulation::thread_now())
#define blockIdx (emulation::block_now())
inline dim3 gridDim;

inline void __syncthreads() {
  emulation::meet_block();
}
inline void __threadfence() {}
inline void __stwb(uint4* address, uint4 value) {
  memcpy(emulation::aligned(address, 16), &value, sizeof(value));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulation::exchange(mask, value, lanes);
}

template <class T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}
inline float atomicExch(float* address, float value) {
  float old;
  __atomic_exchange(address, &value, &old, __ATOMIC_RELAXED);
  return old;
}

template <class To, class From>
To emulated_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

inline float __uint_as_float(uint32_t bits) {
  return emulated_cast<float>(bits);
}
inline float __int_as_float(int32_t bits) {
  return emulated_cast<float>(bits);
}
inline uint32_t __float_as_uint(float x) {
  return emulated_cast<uint32_t>(x);
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;
struct cudaFuncAttributes {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  if (config->gridDim.x == 0 || config->blockDim.x % 32 != 0) return cudaErrorInvalidConfiguration;
  // As on a device: what is pushed into the launch is a copy.
  const auto call = [kernel, arguments...] { kernel(arguments...); };
  gridDim = config->gridDim;
  const bool ended = emulation::run_grid(config->gridDim.x, config->blockDim.x, call);
  return ended ? cudaSuccess : cudaErrorLaunchFailure;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : emulation::complaint();
}
