// The threads of a block as fibers on one thread of the machine.
#pragma once

#include <stdint.h>
#include <string.h>

#include <functional>

namespace emulation {

struct Index {
  unsigned x, y, z;
};

// The indices of the thread that runs.
Index thread_now();
Index block_now();

constexpr unsigned kWarpSize = 32;

// Runs `call` in every thread of every block. False when threads wait for each other forever, or an earlier complaint
// stands; complaint() says what it was.
bool run_grid(unsigned blocks, unsigned threads, const std::function<void()>& call);

void meet_block();

// Meets the other threads of the warp; each leaves up to 16 bytes for the others. Copies those of the thread whose lane
// differs from the own one in the bits `lanes`.
constexpr unsigned kSlot = 16;
void exchange_bytes(unsigned mask, const void* mine, void* theirs, unsigned size, unsigned lanes);

void complain(const char* what);
const char* complaint();

template <class T>
T exchange(unsigned mask, T value, int lanes) {
  static_assert(sizeof(T) <= kSlot, "too large");
  T result;
  exchange_bytes(mask, &value, &result, sizeof(T), static_cast<unsigned>(lanes));
  return result;
}

inline void* aligned(const void* address, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) complain("an access is not aligned as promised");
  return const_cast<void*>(address);
}

}  // namespace emulation
