// Activations on vectors: the value at z, and the gradient with respect to z. The formulas are torch's.
#pragma once

#include "lanes.h"

SPARSEKERN_BEGIN_ISA

template <class C>
using VectorOf = typename Vectors<C>::Vector;

template <class C>
struct Identity {
  SPARSEKERN_INLINE static VectorOf<C> value(VectorOf<C> z) { return z; }
  SPARSEKERN_INLINE static VectorOf<C> gradient(VectorOf<C> grad, VectorOf<C>) { return grad; }
};

template <class C>
struct Relu {
  SPARSEKERN_INLINE static VectorOf<C> value(VectorOf<C> z) { return z <= C(0) ? VectorOf<C>{} : z; }
  SPARSEKERN_INLINE static VectorOf<C> gradient(VectorOf<C> grad, VectorOf<C> z) {
    return z <= C(0) ? VectorOf<C>{} : grad;
  }
};

template <class C>
struct Relu6 {
  SPARSEKERN_INLINE static VectorOf<C> value(VectorOf<C> z) {
    const VectorOf<C> low = z <= C(0) ? VectorOf<C>{} : z;
    return low > C(6) ? VectorOf<C>{} + C(6) : low;
  }
  SPARSEKERN_INLINE static VectorOf<C> gradient(VectorOf<C> grad, VectorOf<C> z) {
    const VectorOf<C> low = z <= C(0) ? VectorOf<C>{} : grad;
    return z >= C(6) ? VectorOf<C>{} : low;
  }
};

template <class C>
struct Hardswish {
  SPARSEKERN_INLINE static VectorOf<C> value(VectorOf<C> z) { return z * Relu6<C>::value(z + C(3)) * C(1.0 / 6); }
  SPARSEKERN_INLINE static VectorOf<C> gradient(VectorOf<C> grad, VectorOf<C> z) {
    const VectorOf<C> inside = z < C(3) ? grad * (z * C(1.0 / 3) + C(0.5)) : grad;
    return z <= C(-3) ? VectorOf<C>{} : inside;
  }
};

// e^x for x <= 0 within 2 ulp, by range reduction and a polynomial (Cephes, expf.c); at least e^-87.
SPARSEKERN_INLINE VectorOf<float> exp_of_negative(VectorOf<float> x) {
  using V = Vectors<float>;
  using Vector = V::Vector;
  // The sum with a number below 2^22 has the nearest integer in its last bits.
  constexpr float kRound = 12582912.0f;
  x = x < -87.0f ? Vector{} - 87.0f : x;
  const Vector shifted = x * 1.44269504088896341f + kRound;
  const Vector n = shifted - kRound;
  const Vector r = x - n * 0.693359375f - n * -2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const V::Integers power = ((V::Integers)shifted - (V::Integers)(Vector{} + kRound) + 127) << 23;
  return p * (Vector)power;
}

// Calls the C library for each lane, so that the result does not depend on the width of a vector. float64 serves
// checks, not speed.
SPARSEKERN_INLINE VectorOf<double> exp_of_negative(VectorOf<double> x) {
  for (int l = 0; l < Vectors<double>::kWidth; ++l) x[l] = __builtin_exp(x[l]);
  return x;
}

template <class C>
struct Silu {
  SPARSEKERN_INLINE static VectorOf<C> sigmoid(VectorOf<C> z) {
    const VectorOf<C> e = exp_of_negative(z > C(0) ? -z : z);
    const VectorOf<C> larger = C(1) / (C(1) + e);
    return z > C(0) ? larger : e * larger;
  }
  SPARSEKERN_INLINE static VectorOf<C> value(VectorOf<C> z) { return z * sigmoid(z); }
  SPARSEKERN_INLINE static VectorOf<C> gradient(VectorOf<C> grad, VectorOf<C> z) {
    const VectorOf<C> s = sigmoid(z);
    return grad * (s * (C(1) + z * (C(1) - s)));
  }
};

SPARSEKERN_END_ISA
