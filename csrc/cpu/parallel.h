// Threads are those of torch's own pool, through the C function that libtorch_cpu exports. A second pool would compete
// with torch's for the cores and ignore torch.set_num_threads.
#pragma once

#include <atomic>
#include <cstdint>

namespace sparsekern {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, RangeFunction, void* context);

// Runs work(i) for every i below `count` on at most `threads` threads. A thread takes the next index when it is free:
// chunks of masked rows cost little, so equal shares would not be equal work. False if torch failed.
template <class Work>
bool parallel_for(ParallelFor torch_parallel_for, int64_t threads, int64_t count, const Work& work) {
  if (threads <= 1 || count <= 1 || torch_parallel_for == nullptr) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return true;
  }
  struct Context {
    const Work& work;
    const int64_t count;
    std::atomic<int64_t> next{0};
  } context{work, count};
  const auto take = [](int64_t, int64_t, void* pointer) {
    Context& shared = *static_cast<Context*>(pointer);
    for (int64_t i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.count;) shared.work(i);
  };
  return torch_parallel_for(0, threads, 1, take, &context) == 0;
}

}  // namespace sparsekern
