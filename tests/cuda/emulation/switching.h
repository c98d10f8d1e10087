// Switching between the scheduler and the threads of a block. switching.cpp jumps; races/switching.cpp tells
// ThreadSanitizer what happens.
#pragma once

namespace emulation {

constexpr unsigned kMostThreads = 1024;

// Runs one thread of a block to its end, in the thread that is current. Part of the scheduler.
void run_thread();

namespace switching {

// Around the blocks of a launch, on the scheduler.
void begin_grid();
void end_grid();

// Around the threads of a block, on the scheduler. The shared memory is filled after begin_block and before make_threads,
// so that all threads come after it.
void begin_block();
void make_threads(unsigned block, unsigned threads);
void end_block(unsigned threads);

// Runs a thread until it leaves.
void resume(unsigned thread);
// Back to the scheduler; returns when the thread is resumed.
void leave(unsigned thread);

// Called by a thread before and after it waits at a barrier, and at its end.
void arrive();
void depart();
void finish();

// Forgets threads that wait forever.
void forget(unsigned threads);

}  // namespace switching
}  // namespace emulation
