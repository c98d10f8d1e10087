#include "fibers.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <vector>

// Bounds of the section of all shared variables, made by the linker.
extern "C" unsigned char __start_emulated_shared[], __stop_emulated_shared[];

namespace emulation {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr unsigned kMostThreads = 1024;

enum class State { kReady, kAtBlock, kAtWarp, kDone };

struct Fiber {
  jmp_buf context;
  ucontext_t entry;
  bool started = false;
  State state = State::kDone;
  unsigned turns = 0;  // meetings of the warp so far
};

struct Warp {
  unsigned arrived = 0;
  Slot slots[2][kWarpSize];  // in turn, so that nobody overwrites what another has yet to read
};

Fiber fibers[kMostThreads];
Warp warps[kMostThreads / kWarpSize];
jmp_buf scheduler;
ucontext_t caller;
unsigned current;
const std::function<void()>* body;
const char* what_is_wrong = nullptr;
unsigned order = 0;

void leave(State state) {
  fibers[current].state = state;
  if (_setjmp(fibers[current].context) == 0) _longjmp(scheduler, 1);
}

// Threads are reused from block to block: a context costs a system call.
void fiber_main() {
  for (;;) {
    (*body)();
    leave(State::kDone);
  }
}

void start(Fiber& fiber) {
  if (fiber.entry.uc_stack.ss_sp == nullptr) {
    fiber.entry.uc_stack.ss_sp =
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fiber.entry.uc_stack.ss_sp == MAP_FAILED) abort();
  }
  void* const stack = fiber.entry.uc_stack.ss_sp;
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = stack;
  fiber.entry.uc_stack.ss_size = kStack;
  fiber.entry.uc_link = &caller;
  makecontext(&fiber.entry, fiber_main, 0);
  fiber.started = true;
  setcontext(&fiber.entry);
}

void resume(unsigned thread) {
  current = thread;
  Fiber& fiber = fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) {
    _longjmp(fiber.context, 1);
  } else {
    start(fiber);
  }
}

void poison_shared() {
  memset(__start_emulated_shared, 0xff, __stop_emulated_shared - __start_emulated_shared);
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

bool run_block(const std::vector<unsigned>& threads, const std::function<void(unsigned)>& set_thread) {
  for (unsigned thread : threads) fibers[thread].state = State::kReady;
  for (unsigned warp = 0; warp < threads.size() / kWarpSize; ++warp) warps[warp].arrived = 0;
  for (;;) {
    bool moved = false;
    unsigned done = 0, waiting = 0;
    for (unsigned thread : threads) {
      if (fibers[thread].state != State::kReady) continue;
      set_thread(thread);
      resume(thread);
      moved = true;
    }
    for (unsigned thread : threads) {
      done += fibers[thread].state == State::kDone;
      waiting += fibers[thread].state == State::kAtBlock;
    }
    if (done == threads.size()) return true;
    // A barrier waits for every thread that has not ended; the kernels' threads end together or not at all.
    if (waiting == threads.size()) {
      for (unsigned thread : threads) fibers[thread].state = State::kReady;
    } else if (!moved) {
      complain("threads wait for others that do not come");
      for (unsigned thread : threads) fibers[thread].started = false, fibers[thread].turns = 0;
      return false;
    }
  }
}

}  // namespace

bool run_grid(unsigned blocks, unsigned threads, const std::function<void()>& call,
              const std::function<void(unsigned)>& set_block, const std::function<void(unsigned)>& set_thread) {
  if (threads > kMostThreads) complain("too many threads in a block");
  if (what_is_wrong != nullptr) return false;
  body = &call;
  for (unsigned block : ordered(blocks, threads)) {
    poison_shared();
    set_block(block);
    if (!run_block(ordered(threads, block), set_thread)) return false;
  }
  return what_is_wrong == nullptr;
}

void meet_block() {
  leave(State::kAtBlock);
}

unsigned current_lane() {
  return current % kWarpSize;
}

Slot* meet_warp(unsigned mask, const Slot& mine) {
  if (mask != 0xffffffffu) complain("a shuffle leaves out a part of the warp");
  Warp& warp = warps[current / kWarpSize];
  Slot* const slots = warp.slots[fibers[current].turns++ % 2];
  slots[current_lane()] = mine;
  if (++warp.arrived < kWarpSize) {
    leave(State::kAtWarp);
  } else {
    warp.arrived = 0;
    const unsigned first = current - current_lane();
    for (unsigned thread = first; thread < first + kWarpSize; ++thread)
      if (thread != current) fibers[thread].state = State::kReady;
  }
  return slots;
}

void complain(const char* what) {
  if (what_is_wrong == nullptr) what_is_wrong = what;
}

const char* complaint() {
  return what_is_wrong == nullptr ? "the launch is not valid" : what_is_wrong;
}

}  // namespace emulation

// 0: blocks and threads in their order, 1: backwards, others: mixed.
extern "C" __attribute__((visibility("default"))) void emulation_order(unsigned value) {
  emulation::order = value;
}

extern "C" __attribute__((visibility("default"))) void emulation_forgive() {
  emulation::what_is_wrong = nullptr;
}
