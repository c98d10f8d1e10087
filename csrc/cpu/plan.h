// How a list of tensors is cut into chunks, and one call over them.
#pragma once

#include <cstdint>
#include <vector>

#include "../abi.h"
#include "parallel.h"

namespace sparsekern {

// The chunk table of one list. It depends on shapes alone, so that results are the same at any number of threads
// and whatever is masked. Immutable.
class Plan {
 public:
  explicit Plan(std::vector<Shape> shapes);

  int64_t tensors() const { return static_cast<int64_t>(shapes_.size()); }
  int64_t elements() const { return elements_; }
  bool tracks() const { return tracks_; }

  // One step over the list. The addresses, bias, rows and hyperparameters of `job` are filled in by the caller.
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
