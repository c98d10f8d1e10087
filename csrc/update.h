// The contract of an Update: what one optimizer's arithmetic provides, so that the loops of each device can run it.
//
// There are four updates, each written once per language: SGD and Adam (sgd, adam), and the two passes around the step
// of an optimizer that knows nothing of rows (external): statistics before it, decay, fade and mask after it. An update
// is a class template over the storage type S; it computes in C = Compute<S>::Type. It is made for one tensor of one
// call and knows nothing of rows, chunks or channels. The loops give it three things for each element:
//
//   d      the gradient, unscaled, with the sign that is descended
//   decay  AdamW and the mask multiply the weight by it; SGD and Adam add decay * weight to the gradient
//   fade   what the row's countdown asks for: 1 for most rows, (k - 1) / k where k steps are left, 0 where a fade ends
//          (weights and state become 0, whatever they were), negative where the row is masked
//
// On the CPU (cpu/isa/: chunk_kernel.h calls it, sgd.h, adam.h and external.h provide it):
//
//   Update(const Job&, int32_t tensor)
//   static constexpr bool kReadsGrad      false: `d` is null
//   static constexpr bool kTakesRowRuns   true: there is update_rows(), called where expands_row_values() holds
//   update(at, n, d, decay, fade, statistics)
//       Updates elements [at, at + n) of the tensor. `d` points at n gradients, of type C, or of type S where
//       fuses_statistics(). `decay` and `fade` are values of values.h. `statistics` (statistics.h) takes the four sums
//       of each row from the weights before the update; NoStatistics where none are wanted.
//   update_rows(at, d, rows)              the same for a RowRun of rows in one piece (fused_update.h), AVX-512 only
//   masked(at, n)                         n elements of masked rows: nothing, or zeros where another optimizer may have
//                                         moved them
//   end(at, n)                            n elements of rows whose fade ends: weights and state become 0
//   prefetch(at)                          asks for the cache line of weights and state at element `at`
//   fuses_statistics()                    one loop takes the statistics and makes the update; else the statistics of a
//                                         block come first, and the update while the block is in the first-level cache
//   expands_row_values()                  the loop reads one decay, fade and threshold for every four elements
//
// On a GPU (cuda/: worker.cuh calls it, sgd.cuh, adam.cuh and external.cuh provide it):
//
//   Update(const Table&, const Entry&, const Conditions&)
//   static constexpr int kStates          how many state lists there are, from kState0 on
//   static constexpr bool kReadsGrad      false: the gradient is not loaded
//   static constexpr bool kWrites         false: weights and state are not stored
//   static constexpr bool kClearsMasked   true: masked rows are set to 0; else they are not touched
//   ignores_states()                      what the states hold is not used (SGD's first step)
//   leaves(row)                           there is nothing to do for a row with these factors
//   C operator()(C w, C d, C* state, row) the updated weight of one element, before its fade; writes its state
//
// Torch's order of operations is kept throughout, so that results equal torch.optim to 2 ulp a step, and CPU and GPU
// the same bits.
#pragma once
