// The contract of an Update: what the arithmetic of one optimizer provides, so that the loops of each device can run
// it. csrc/cpu/isa/ and csrc/cuda/ cite this file. It holds no code: an Update is a template parameter, and a compiler
// error in a loop names a missing member.
//
// There are four Updates, each written once for the CPU and once for CUDA: SGD (sgd), Adam and AdamW (adam), and the
// two passes around the step of an external optimizer (external): statistics before it; penalty, fade and mask after
// it. An Update is a class template over the storage type S. It computes in C = Compute<S>::Type. It is made for one
// tensor of one call. It knows the hyperparameters and the tensor's weights and state, and does not know rows, chunks
// or channels. The loops give it three numbers for each element:
//
//   d      the gradient, unscaled, and negated if `maximize` is set
//   decay  for AdamW and the mask: the factor of the weight. For SGD and Adam: decay * weight is added to the gradient
//   fade   the factor of the updated weight: 1 for most rows; (k - 1) / k for a row that is fading, with k steps left;
//   0 in
//          the last step of a fade, in which weights and state become 0, even NaN; negative (CPU) or `masked` (CUDA)
//          for a masked row
//
// On the CPU, chunk_kernel.h and the loops that it selects use an Update; sgd.h, adam.h and external.h define them:
//
//   Update(const Job&, int32_t tensor)
//   static constexpr bool kReadsGrad      false: `d` is null
//   static constexpr bool kTakesRowRuns   true: update_rows() exists; it is called if expands_row_values() is true
//   update(at, n, d, decay, fade, statistics)
//       Updates elements [at, at + n) of the tensor. `d` points to n gradients, of type C, or of type S if
//       reads_stored_gradients(). `decay` and `fade` are types of values.h. `statistics` (statistics.h) receives
//       weights and gradients before the update and keeps the four sums of each row; it is NoStatistics if none are
//       wanted. A NaN in an updated state has to make the updated weight a NaN: a loop looks for NaN in weights alone.
//   update_rows(at, d, rows)              the same for a RowRun (fused_update.h): contiguous short rows, with AVX-512
//   masked(at, n)                         called for n elements of masked rows: does nothing, or writes zeros if an
//   external
//                                         optimizer may have changed them
//   end(at, n)                            called for n elements of rows whose fade ends: sets weights and state to 0
//   prefetch(at)                          prefetches the cache lines of weights and state at element `at`
//   reads_stored_gradients()              update() takes gradients of type S where they are stored
//   fuses_statistics()                    one loop takes the statistics and makes the update (AVX-512). If false, the
//                                         statistics of a block are taken first, and the update follows while the
//                                         block is in the first-level cache
//   expands_row_values()                  the loop reads one decay, fade and threshold for every four elements
//
// On a GPU, worker.cuh uses an Update; sgd.cuh, adam.cuh and external.cuh define them:
//
//   Update(const Table&, const Entry&, const Conditions&)      called by whole blocks
//   static constexpr int kStates          number of state lists, from kState0 on
//   static constexpr bool kReadsGrad      false: the gradient is not loaded
//   static constexpr bool kWrites         false: weights and state are not stored
//   static constexpr bool kClearsMasked   true: masked rows are set to 0. If false they are not touched
//   ignores_states()                      the contents of the states are not used (first step of SGD)
//   skips(row)                            a row with these factors needs no work
//   C operator()(C w, C d, C* state, row) returns the updated weight of one element, before its fade, and updates its
//   state
//
// Every Update keeps torch's order of operations, so results equal those of torch.optim to 2 ulp a step, and CPU and
// GPU compute the same bits. The reference in sparsekern/kernels/backends/reference/step.py is the specification of
// each.
#pragma once
