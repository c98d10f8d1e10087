// A native plan: how a list of tensors is divided into chunks, and one step over them.
#pragma once

#include <cstdint>
#include <vector>

#include "../abi.h"
#include "parallel.h"

namespace sparsekern {

// The chunks of one list of tensors. They depend on shapes alone, so results are the same for any number of threads and
// any mask. Immutable.
class Plan {
 public:
  explicit Plan(std::vector<Shape> shapes);

  int64_t tensors() const { return static_cast<int64_t>(shapes_.size()); }
  int64_t elements() const { return elements_; }
  bool tracks() const { return tracks_; }

  // Runs one step over the list. The caller fills in the addresses, rows, hyperparameters and flags of `job`.
  Error run(Job job, const Kernels& kernels, Op op, Dtype dtype, ParallelFor parallel, int64_t threads) const;

 private:
  void cut(int32_t tensor);

  std::vector<Shape> shapes_;
  std::vector<Pieces> pieces_;
  std::vector<Chunk> chunks_;
  std::vector<int32_t> chunks_of_;  // per tensor
  int64_t partial_rows_ = 0;
  int64_t elements_ = 0;
  bool tracks_ = false;
};

}  // namespace sparsekern
