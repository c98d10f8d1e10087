// As emulation/switching.cpp, with the events that ThreadSanitizer has to know: a barrier orders what the threads of a
// block do; shuffles and blocks order nothing; the end of a launch orders all. Compiled without -fsanitize.
#include "switching.h"

#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <vector>

// ThreadSanitizer's interface for fibers (sanitizer/tsan_interface.h of LLVM).
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_set_fiber_name(void* fiber, const char* name);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
extern unsigned char emulated_shared_begin[], emulated_shared_end[];
}

namespace emulation::switching {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr unsigned kUnordered = 1;  // a switch does not order what is before and after it

// It reports no race with a fiber that is destroyed, and it has a limit of about 8000.
constexpr size_t kKept = 6500;

struct Fiber {
  ucontext_t context;
  void* stack;
  void* known;
};

Fiber fibers[kMostThreads];
ucontext_t scheduler;
void* scheduler_known;
std::deque<void*> ended;
std::vector<std::unique_ptr<char>> barriers;  // an address for each block; they all stay, so that none is used again
char grid;

void fiber_main() {
  run_thread();
  abort();  // it is not resumed after its end
}

void prepare(Fiber& fiber, unsigned block, unsigned thread) {
  if (fiber.stack == nullptr) {
    fiber.stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fiber.stack == MAP_FAILED) abort();
  }
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  fiber.known = __tsan_create_fiber(0);
  char name[48];
  snprintf(name, sizeof(name), "block %u thread %u", block, thread);
  __tsan_set_fiber_name(fiber.known, name);
}

// New memory, for which no access is on record: blocks do not share it.
void map_anew(void* address, size_t size) {
  if (munmap(address, size) != 0 ||
      mmap(address, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != address)
    abort();
}

}  // namespace

void begin_grid() {
  scheduler_known = __tsan_get_current_fiber();
}

void end_grid() {
  __tsan_acquire(&grid);
}

void begin_block() {
  map_anew(emulated_shared_begin, static_cast<size_t>(emulated_shared_end - emulated_shared_begin));
}

void make_threads(unsigned block, unsigned threads) {
  barriers.emplace_back(new char);
  for (unsigned thread = 0; thread < threads; ++thread) prepare(fibers[thread], block, thread);
}

void end_block(unsigned threads) {
  for (unsigned thread = 0; thread < threads; ++thread) {
    ended.push_back(fibers[thread].known);
    // Stacks are used again; a record of the last owner would be taken for a race.
    map_anew(fibers[thread].stack, kStack);
  }
  for (; ended.size() > kKept; ended.pop_front()) __tsan_destroy_fiber(ended.front());
}

void resume(unsigned thread) {
  __tsan_switch_to_fiber(fibers[thread].known, kUnordered);
  swapcontext(&scheduler, &fibers[thread].context);
}

void leave(unsigned thread) {
  __tsan_switch_to_fiber(scheduler_known, kUnordered);
  swapcontext(&fibers[thread].context, &scheduler);
}

void arrive() {
  __tsan_release(barriers.back().get());
}

void depart() {
  __tsan_acquire(barriers.back().get());
}

void finish() {
  __tsan_release(&grid);
}

void forget(unsigned) {}

}  // namespace emulation::switching
