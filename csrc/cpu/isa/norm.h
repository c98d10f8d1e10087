// Batch normalisation with its activation: the arithmetic for a vector of elements, and the loops over the data.
//
// If inner > 1, the elements of one channel are neighbours and a loop runs over them. If inner is 1, the channels are
// neighbours, and a loop runs down a few columns of them, row by row. Both keep the channels' numbers in registers.
#pragma once

#include "../../abi.h"
#include "activation.h"

SPARSEKERN_BEGIN_ISA

template <class S>
SPARSEKERN_INLINE S* at(S* data, int64_t i) {
  return data ? data + i : nullptr;
}

// Rows of a block that is processed column by column.
constexpr int64_t kNormRows = 64;

// Vectors across a column. With fewer, a row would be read in pieces smaller than neighbouring cache lines.
constexpr int kColumn = 4;

// A Term for each of kVectors neighbouring vectors. The compiler would keep an array in memory and not in registers.
template <class Term, int kVectors>
struct Chain {
  Term first;
  Chain<Term, kVectors - 1> rest;

  // `make(v)` returns the term of vector v.
  template <class Make>
  SPARSEKERN_INLINE explicit Chain(const Make& make, int v = 0) : first(make(v)), rest(make, v + 1) {}
};
template <class Term>
struct Chain<Term, 0> {
  template <class Make>
  SPARSEKERN_INLINE explicit Chain(const Make&, int) {}
};

template <class S>
struct NormInput {
  using C = typename Compute<S>::Type;
  using V = Vectors<C>;
  using Vector = typename V::Vector;
  using Integers = typename V::Integers;

  const S* x;
  const S* residual;
  const S* grad;
  Vector scale, shift, mean, slope, offset, threshold;
  Integers live;
  bool centred;

  // The data from element `i` on, with the numbers of `channel`, or of as many channels from it on as a vector has
  // lanes.
  NormInput(const NormJob& job, int64_t channel, int64_t i)
      : x(at(static_cast<const S*>(job.x), i)),
        residual(at(static_cast<const S*>(job.residual), i)),
        grad(at(static_cast<const S*>(job.grad), i)),
        scale(number(job, job.scale, channel)),
        shift(number(job, job.shift, channel)),
        mean(number(job, job.mean, channel)),
        slope(number(job, job.slope, channel)),
        offset(number(job, job.offset, channel)),
        threshold(number(job, job.threshold, channel)),
        live((Integers)number(job, job.live, channel)),
        centred(job.centred) {}

  static Vector number(const NormJob& job, const void* numbers, int64_t channel) {
    const C* first = static_cast<const C*>(numbers) + channel;
    if (job.inner == 1) return V::load(first);
    Vector same;
    for (int l = 0; l < V::kWidth; ++l) same[l] = *first;
    return same;
  }

  // Zeros in masked channels, even for NaN.
  SPARSEKERN_INLINE Vector only_live(Vector values) const { return (Vector)((Integers)values & live); }

  SPARSEKERN_INLINE Vector x_at(int64_t i) const { return only_live(V::load(x + i)); }

  SPARSEKERN_INLINE Vector z_of(Vector x_i, int64_t i) const {
    const Vector z = x_i * scale + shift;
    return residual ? z + V::load(residual + i) : z;
  }

  // Keeps the compiler from merging a load with the mask of a later operation. A masked load waits for everything that
  // the mask depends on, and the pass took nearly twice as long.
  SPARSEKERN_INLINE static Vector loaded(Vector vector) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(vector));
#endif
    return vector;
  }

  template <class Act>
  SPARSEKERN_INLINE Vector dz_of(Vector x_i, int64_t i) const {
    return Act::gradient(loaded(V::load(grad + i)), z_of(x_i, i));
  }

  // Buffers, padded with zeros, for the last elements of a run, which do not fill a vector.
  struct Buffers {
    S x[kLanes] = {}, residual[kLanes] = {}, grad[kLanes] = {};
  };
  SPARSEKERN_INLINE NormInput tail(Buffers& buffers, int64_t begin, int64_t n) const {
    NormInput tail = *this;
    const auto take = [&](const S*& data, S* buffer) {
      if (data == nullptr) return;
      __builtin_memcpy(buffer, data + begin, static_cast<uint64_t>(n) * sizeof(S));
      data = buffer;
    };
    take(tail.x, buffers.x);
    take(tail.residual, buffers.residual);
    take(tail.grad, buffers.grad);
    return tail;
  }
};

// y = activation(z)
template <class S, class Act>
struct Forward {
  using Input = NormInput<S>;
  S* y;

  Forward(const NormJob& job, int64_t i) : y(static_cast<S*>(job.y) + i) {}

  SPARSEKERN_INLINE void vector(const Input& input, int64_t i) const {
    Input::V::store(Act::value(input.z_of(input.x_at(i), i)), y + i);
  }

  void tail(const Input& input, int64_t begin, int64_t n) const {
    Forward buffered = *this;
    S buffer[Input::V::kWidth];
    buffered.y = buffer;
    buffered.vector(input, 0);
    __builtin_memcpy(y + begin, buffer, static_cast<uint64_t>(n) * sizeof(S));
  }
};

// The gradients of x and of the residual.
template <class S, class Act>
struct Backward {
  using Input = NormInput<S>;
  S* grad_x;
  S* grad_residual;

  Backward(const NormJob& job, int64_t i)
      : grad_x(static_cast<S*>(job.grad_x) + i), grad_residual(at(static_cast<S*>(job.grad_residual), i)) {}

  SPARSEKERN_INLINE void vector(const Input& input, int64_t i) const {
    const typename Input::Vector x = input.x_at(i), dz = input.template dz_of<Act>(x, i);
    typename Input::Vector dx = dz * input.scale;
    if (input.centred) dx += (x - input.mean) * input.slope + input.offset;
    Input::V::store(input.only_live(dx), grad_x + i);
    if (grad_residual) Input::V::store(dz, grad_residual + i);
  }

  void tail(const Input& input, int64_t begin, int64_t n) const {
    Backward buffered = *this;
    S buffer[2][Input::V::kWidth];
    buffered.grad_x = buffer[0];
    if (grad_residual) buffered.grad_residual = buffer[1];
    buffered.vector(input, 0);
    const uint64_t bytes = static_cast<uint64_t>(n) * sizeof(S);
    __builtin_memcpy(grad_x + begin, buffer[0], bytes);
    if (grad_residual) __builtin_memcpy(grad_residual + begin, buffer[1], bytes);
  }
};

template <class Pass, class S, int kVectors>
SPARSEKERN_INLINE void run(const Pass& pass, const Chain<NormInput<S>, kVectors>& inputs, int64_t i) {
  if constexpr (kVectors > 0) {
    pass.vector(inputs.first, i);
    run(pass, inputs.rest, i + NormInput<S>::V::kWidth);
  }
}

template <class Pass, class S>
inline void norm_column(const NormJob& job, int64_t row, int64_t rows, int64_t c) {
  constexpr int64_t kWidth = NormInput<S>::V::kWidth;
  const int64_t i = row * job.channels + c;
  const Chain<NormInput<S>, kColumn> inputs([&](int v) { return NormInput<S>(job, c + v * kWidth, i); });
  const Pass pass(job, i);
  for (int64_t r = 0; r < rows; ++r) run(pass, inputs, r * job.channels);
}

// Applies a pass to every run of a channel.
template <class Pass, class S>
inline void norm_runs(const NormJob& job, const NormPiece& piece) {
  constexpr int64_t kWidth = NormInput<S>::V::kWidth;
  const NormInput<S> input(job, piece.channel, 0);
  const Pass pass(job, 0);
  for (int64_t o = piece.outer_begin; o < piece.outer_end; ++o) {
    int64_t i = (o * job.channels + piece.channel) * job.inner;
    const int64_t end = i + job.inner;
    for (; i + kWidth <= end; i += kWidth) pass.vector(input, i);
    if (i == end) continue;
    typename NormInput<S>::Buffers buffers;
    pass.tail(input.tail(buffers, i, end - i), i, end - i);
  }
}

// Calls column(first row, rows, first channel) for every column of every block of rows of a piece.
template <class S, class Column>
inline void for_columns(const NormJob& job, const NormPiece& piece, const Column& column) {
  for (int64_t row = piece.outer_begin; row < piece.outer_end; row += kNormRows)
    for (int64_t c = 0; c < job.channels; c += kColumn * NormInput<S>::V::kWidth)
      column(row, minimum(kNormRows, piece.outer_end - row), c);
}

template <template <class, class> class Kind, class S, template <class> class Act>
inline void norm_pass(const NormJob* job, const NormPiece* piece) {
  using Pass = Kind<S, Act<typename Compute<S>::Type>>;
  if (job->inner > 1) return norm_runs<Pass, S>(*job, *piece);
  for_columns<S>(*job, *piece, [&](int64_t row, int64_t rows, int64_t c) { norm_column<Pass, S>(*job, row, rows, c); });
}

SPARSEKERN_END_ISA
