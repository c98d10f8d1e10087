#include "fibers.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "switching.h"

// Bounds of all variables in shared memory, made by shared.ld.
extern "C" unsigned char emulated_shared_begin[], emulated_shared_end[];

namespace emulation {
namespace {

enum class State { kReady, kAtBlock, kAtWarp, kDone };

struct Thread {
  State state = State::kDone;
  unsigned turns = 0;  // meetings of the warp so far
};

struct Slot {
  alignas(kSlot) unsigned char bytes[kSlot];
};

struct Warp {
  unsigned arrived = 0;
  Slot slots[2][kWarpSize];  // in turn, so that nobody overwrites what another has yet to read
};

Thread threads_of_block[kMostThreads];
Warp warps[kMostThreads / kWarpSize];
unsigned current, current_block;
const std::function<void()>* body;
const char* what_is_wrong = nullptr;
unsigned order = 0;
bool starving = false;

void leave(State state) {
  threads_of_block[current].state = state;
  switching::leave(current);
}

void resume(unsigned thread) {
  current = thread;
  switching::resume(thread);
}

bool ready(unsigned thread) {
  return threads_of_block[thread].state == State::kReady;
}

void poison_shared() {
  memset(emulated_shared_begin, 0xff, static_cast<size_t>(emulated_shared_end - emulated_shared_begin));
}

// The order of `count` things: as they come, backwards, or mixed.
std::vector<unsigned> ordered(unsigned count, unsigned salt) {
  std::vector<unsigned> result(count);
  std::iota(result.begin(), result.end(), 0u);
  if (order == 1) std::reverse(result.begin(), result.end());
  uint32_t state = order * 2654435761u + salt;
  for (unsigned i = count; order > 1 && i > 1; --i) {
    state = state * 1664525u + 1013904223u;
    std::swap(result[i - 1], result[(state >> 8) % i]);
  }
  return result;
}

// Each thread up to where it waits, or each warp up to where all of it waits at a barrier. True if any thread ran.
bool run_once(const std::vector<unsigned>& threads) {
  bool moved = false;
  for (unsigned thread : threads) {
    const unsigned first = thread / kWarpSize * kWarpSize;
    for (bool again = ready(thread); again;) {
      if (ready(thread)) resume(thread), moved = true;
      again = false;
      for (unsigned other = first; starving && other < first + kWarpSize; ++other) {
        if (!ready(other)) continue;
        resume(other);
        again = true;
      }
    }
  }
  return moved;
}

bool run_block(const std::vector<unsigned>& threads) {
  const unsigned count = static_cast<unsigned>(threads.size());
  for (unsigned thread : threads) threads_of_block[thread].state = State::kReady;
  for (unsigned warp = 0; warp < count / kWarpSize; ++warp) warps[warp].arrived = 0;
  for (;;) {
    const bool moved = run_once(threads);
    unsigned done = 0, waiting = 0;
    for (unsigned thread : threads) {
      done += threads_of_block[thread].state == State::kDone;
      waiting += threads_of_block[thread].state == State::kAtBlock;
    }
    if (done == count) return true;
    // A barrier waits for every thread that has not ended; the kernels' threads end together or not at all.
    if (waiting == count) {
      for (unsigned thread : threads) threads_of_block[thread].state = State::kReady;
    } else if (!moved) {
      complain("threads wait for others that do not come");
      switching::forget(count);
      for (unsigned thread : threads) threads_of_block[thread].turns = 0;
      return false;
    }
  }
}

// Waits until all threads of the warp have left their bytes, and returns where they are.
const Slot* meet_warp(unsigned mask, const Slot& mine) {
  if (mask != 0xffffffffu) complain("a shuffle leaves out a part of the warp");
  Warp& warp = warps[current / kWarpSize];
  Slot* const slots = warp.slots[threads_of_block[current].turns++ % 2];
  slots[current % kWarpSize] = mine;
  if (++warp.arrived < kWarpSize) {
    leave(State::kAtWarp);
  } else {
    warp.arrived = 0;
    const unsigned first = current / kWarpSize * kWarpSize;
    for (unsigned thread = first; thread < first + kWarpSize; ++thread)
      if (thread != current) threads_of_block[thread].state = State::kReady;
  }
  return slots;
}

}  // namespace

void run_thread() {
  (*body)();
  switching::finish();
  leave(State::kDone);
}

Index thread_now() {
  return {current, 0, 0};
}

Index block_now() {
  return {current_block, 0, 0};
}

bool run_grid(unsigned blocks, unsigned threads, const std::function<void()>& call) {
  if (threads > kMostThreads) complain("too many threads in a block");
  if (what_is_wrong != nullptr) return false;
  body = &call;
  switching::begin_grid();
  bool ended = true;
  for (unsigned block : ordered(blocks, threads)) {
    current_block = block;
    switching::begin_block();
    poison_shared();
    switching::make_threads(block, threads);
    ended = run_block(ordered(threads, block));
    if (!ended) break;
    switching::end_block(threads);
  }
  switching::end_grid();
  return ended && what_is_wrong == nullptr;
}

void meet_block() {
  switching::arrive();
  leave(State::kAtBlock);
  switching::depart();
}

void exchange_bytes(unsigned mask, const void* mine, void* theirs, unsigned size, unsigned lanes) {
  Slot slot = {};
  memcpy(slot.bytes, mine, size);
  const Slot* all = meet_warp(mask, slot);
  memcpy(theirs, all[current % kWarpSize ^ lanes].bytes, size);
}

void complain(const char* what) {
  if (what_is_wrong == nullptr) what_is_wrong = what;
}

const char* complaint() {
  return what_is_wrong == nullptr ? "the launch is not valid" : what_is_wrong;
}

}  // namespace emulation

// 0: blocks and threads in their order, 1: backwards, others: mixed. `starve`: a warp runs up to a barrier before another
// one gets a turn, as far from lockstep as a GPU may go.
extern "C" __attribute__((visibility("default"))) void emulation_order(unsigned value, int starve) {
  emulation::order = value;
  emulation::starving = starve != 0;
}

extern "C" __attribute__((visibility("default"))) void emulation_forgive() {
  emulation::what_is_wrong = nullptr;
}
