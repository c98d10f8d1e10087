// The threads of a block as fibers on one thread of the machine.
#pragma once

#include <stdint.h>
#include <string.h>

#include <functional>

namespace emulation {

// Inline variables, of a type that is complete only in cuda_runtime.h.
template <class T>
inline T thread_index;
template <class T>
inline T block_index;
template <class T>
inline T grid_size;

constexpr unsigned kWarpSize = 32;

// Runs `call` in every thread of every block. False when threads wait for each other forever, or an earlier complaint
// stands; complaint() says what it was.
bool run_grid(unsigned blocks, unsigned threads, const std::function<void()>& call,
              const std::function<void(unsigned)>& set_block, const std::function<void(unsigned)>& set_thread);

void meet_block();

// Meets the other threads of the warp; `slots` is where each of them leaves 16 bytes for the others.
struct Slot {
  alignas(16) unsigned char bytes[16];
};
unsigned current_lane();
Slot* meet_warp(unsigned mask, const Slot& mine);

void complain(const char* what);
const char* complaint();

template <class T>
T exchange(unsigned mask, T value, int lanes) {
  static_assert(sizeof(T) <= sizeof(Slot), "too large");
  Slot mine = {};
  memcpy(mine.bytes, &value, sizeof(value));
  const Slot* all = meet_warp(mask, mine);
  T result;
  memcpy(&result, all[current_lane() ^ static_cast<unsigned>(lanes)].bytes, sizeof(result));
  return result;
}

inline void* aligned(const void* address, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) complain("an access is not aligned as promised");
  return const_cast<void*>(address);
}

}  // namespace emulation
