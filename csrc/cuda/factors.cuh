// The conditions of a step that only the device knows, and the factors of a row in the update of its elements.
#pragma once

#include "numbers.cuh"
#include "table.cuh"

namespace sparsekern::cuda {

// Known on the device only: the learning rate, whether the step is applied, and whether rows are updated.
struct Conditions {
  double lr;
  bool apply, update_statistics;
};

__device__ inline Conditions conditions_of(const Table& table) {
  const double lr = read(table.lr);
  const bool apply = !table.skippable || read(table.found_inf) != 1;
  return {lr, apply, apply && lr != 0};
}

template <class C>
struct Factors {
  C decay;      // multiplies the weight (AdamW, mask); else decay * weight is added to the gradient
  C fade;       // multiplies the new weight
  bool masked;  // nothing is read or written
  bool ends;    // weight and state become 0
};

template <class C>
__device__ inline C decay_of(const Hyper& hyper, double lr, double penalty) {
  const double rate = hyper.weight_decay + penalty;
  return static_cast<C>(hyper.decoupled ? 1 - lr * rate : rate);
}

template <class C>
__device__ inline Factors<C> factors_of(const Table& table, const Entry& entry, int32_t row,
                                        const Conditions& conditions) {
  if (entry.start < 0) return {decay_of<C>(table.hyper, conditions.lr, 0), C(1), false, false};
  const int64_t r = static_cast<int64_t>(entry.start) + row;
  const int32_t left = table.rows.countdown[r];
  const bool fades = left > 0 && table.fades && conditions.update_statistics;
  const C fade = fades ? static_cast<C>(left - 1) / static_cast<C>(left) : C(1);
  return {decay_of<C>(table.hyper, conditions.lr, table.rows.penalty[r]), fade, left == 0, fades && left == 1};
}

}  // namespace sparsekern::cuda
