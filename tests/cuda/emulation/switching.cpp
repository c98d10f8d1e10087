// Threads keep their stacks from block to block, because making a context costs a system call.
#include "switching.h"

#include <setjmp.h>
#include <stddef.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdlib>

namespace emulation::switching {
namespace {

constexpr size_t kStack = 128 * 1024;

struct Fiber {
  jmp_buf context;
  ucontext_t entry;
  bool started = false;
};

Fiber fibers[kMostThreads];
jmp_buf scheduler;
ucontext_t caller;

void fiber_main() {
  for (;;) run_thread();
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

}  // namespace

void begin_grid() {}
void end_grid() {}
void begin_block() {}
void make_threads(unsigned, unsigned) {}
void end_block(unsigned) {}
void arrive() {}
void depart() {}
void finish() {}

void resume(unsigned thread) {
  Fiber& fiber = fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) {
    _longjmp(fiber.context, 1);
  } else {
    start(fiber);
  }
}

void leave(unsigned thread) {
  if (_setjmp(fibers[thread].context) == 0) _longjmp(scheduler, 1);
}

void forget(unsigned threads) {
  for (unsigned thread = 0; thread < threads; ++thread) fibers[thread].started = false;
}

}  // namespace emulation::switching
