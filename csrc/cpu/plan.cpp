#include "plan.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

namespace sparsekern {

namespace {

// Elements of a chunk: enough to amortise its overhead, few enough to use all threads on small networks.
constexpr int64_t kChunk = 32 * 1024;

// The same if rows are not contiguous (outer > 1) and a chunk has to keep the sums of all of its rows.
constexpr int64_t kScatteredChunk = 128 * 1024;

// Columns of the [rows, inner] plane in a chunk of such a tensor: one tile of cpu/isa/column_tiles.h.
constexpr int64_t kColumns = 2048;

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Increments the step counters of Adam's tensors and returns their bias corrections.
std::vector<AdamBias> adam_bias(const Job& job, size_t tensors) {
  std::vector<AdamBias> bias(tensors);
  for (size_t i = 0; i < tensors; ++i) {
    float* count = static_cast<float*>(job.addresses[kStep][i]);
    *count += 1;
    // The count is nearly always that of the tensor before, and two powers cost more than the update of a small tensor.
    if (i > 0 && *count == *static_cast<const float*>(job.addresses[kStep][i - 1])) {
      bias[i] = bias[i - 1];
      continue;
    }
    bias[i].step_size = job.hyper.lr / (1 - std::pow(job.hyper.beta1, static_cast<double>(*count)));
    bias[i].inverse_root = 1 / std::sqrt(1 - std::pow(job.hyper.beta2, static_cast<double>(*count)));
  }
  return bias;
}

}  // namespace

Plan::Plan(std::vector<Shape> shapes) : shapes_(std::move(shapes)) {
  for (size_t i = 0; i < shapes_.size(); ++i) {
    const size_t before = chunks_.size();
    cut(static_cast<int32_t>(i));
    chunks_of_.push_back(static_cast<int32_t>(chunks_.size() - before));
    elements_ += shapes_[i].outer * shapes_[i].rows * shapes_[i].inner;
    tracks_ = tracks_ || shapes_[i].start >= 0;
  }
}

void Plan::cut(int32_t tensor) {
  const Shape& shape = shapes_[tensor];
  const bool scattered = shape.outer > 1;
  const int64_t widest = scattered ? kColumns : kChunk;
  const int64_t inner_step = std::min(shape.inner, widest);
  const int64_t row_step = std::max<int64_t>(1, widest / inner_step);
  const int64_t outer_step = std::max<int64_t>(1, kScatteredChunk / (std::min(row_step, shape.rows) * inner_step));
  const int64_t inner_pieces = divide_up(shape.inner, inner_step);
  const int64_t outer_pieces = divide_up(shape.outer, outer_step);
  for (int64_t row = 0; row < shape.rows; row += row_step) {
    for (int64_t outer = 0; outer < outer_pieces; ++outer) {
      for (int64_t inner = 0; inner < inner_pieces; ++inner) {
        chunks_.push_back({tensor, static_cast<int32_t>(outer * inner_pieces + inner),           //
                           outer * outer_step, std::min(shape.outer, (outer + 1) * outer_step),  //
                           row, std::min(shape.rows, row + row_step),                            //
                           inner * inner_step, std::min(shape.inner, (inner + 1) * inner_step)});
      }
    }
  }
  const int64_t count = outer_pieces * inner_pieces;
  pieces_.push_back({count, partial_rows_});
  if (shape.start >= 0 && count > 1) partial_rows_ += count * shape.rows;
}

Error Plan::run(Job job, const Kernels& kernels, Op op, Dtype dtype, ParallelFor parallel, int64_t threads) const {
  // Scratch memory belongs to the call, so two Python threads may run one plan at the same time.
  const auto left = std::make_unique<std::atomic<int32_t>[]>(shapes_.size());
  for (size_t i = 0; i < shapes_.size(); ++i) left[i].store(chunks_of_[i], std::memory_order_relaxed);
  const std::unique_ptr<float[]> partials(new float[static_cast<size_t>(partial_rows_) * 4]);
  job.shapes = shapes_.data();
  job.pieces = pieces_.data();
  job.partials = partials.get();
  job.apart = kernels.apart;
  std::vector<AdamBias> bias;
  if (op == kAdam) bias = adam_bias(job, shapes_.size());
  job.bias = bias.data();

  const auto work_on_chunk = kernels.chunk[op][dtype];
  const auto work = [&](int64_t i) {
    const Chunk& chunk = chunks_[static_cast<size_t>(i)];
    work_on_chunk(&job, &chunk);
    // The thread that ends a tensor's last chunk sees the sums of all its chunks, and finishes its rows.
    if (left[static_cast<size_t>(chunk.tensor)].fetch_sub(1, std::memory_order_acq_rel) == 1)
      kernels.finish(&job, chunk.tensor);
  };
  const int64_t useful = std::max<int64_t>(1, elements_ / kChunk);
  const bool done = parallel_for(parallel, std::min(threads, useful), static_cast<int64_t>(chunks_.size()), work);
  if (done && job.statistics) *job.rows.pending = 1;
  return done ? kOk : kParallelFailed;
}

}  // namespace sparsekern
