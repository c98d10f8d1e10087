// Per-element values of a loop (decays, fades, thresholds), for a vector of elements: the same for all,
// one for each, or one for every four. And the effect of a fade on an updated element. The place of a vector is the
// index of its first element, or EveryOther.
#pragma once

#include "lanes.h"

SPARSEKERN_BEGIN_ISA

// One value for all elements.
template <class C>
struct Same {
  using Vector = typename Vectors<C>::Vector;
  C value;

  C operator[](int64_t) const { return value; }
  template <class Place>
  SPARSEKERN_INLINE Vector vector(Place) const {
    return Vectors<C>::repeat(value);
  }
};

// A value for each element.
template <class C>
struct Each {
  using Vector = typename Vectors<C>::Vector;
  const C* __restrict value;

  C operator[](int64_t i) const { return value[i]; }
  SPARSEKERN_INLINE Vector vector(int64_t i) const { return Vectors<C>::load(value + i); }
  template <int first>
  SPARSEKERN_INLINE Vector vector(EveryOther<first> place) const {
    return Vectors<C>::template every_other<first>(vector(place.i), vector(place.i + Vectors<C>::kWidth));
  }
};

// A value for every four elements, for rows of four: with a quarter of the memory a tile stays in the first-level
// cache.
template <class C>
struct EachFour {
  using Vector = typename Vectors<C>::Vector;
  const C* __restrict value;

  C operator[](int64_t i) const { return value[i / 4]; }
  SPARSEKERN_INLINE Vector vector(int64_t i) const { return Vectors<C>::fourfold(value + i / 4); }
};

// Weight decay on the gradient: gradients `d` plus the decay of weights `w`. Where the decay is 0, nothing is added: 0
// times an infinite weight is NaN.
template <class Decay, class Place, class Vector>
SPARSEKERN_INLINE Vector add_decay(Decay decay, Place place, Vector d, Vector w) {
  const Vector factor = decay.vector(place);
  return factor == Vector{} ? d : d + w * factor;
}

// One decay for all elements, known to be 0 or known to be another number: each has its arithmetic.
struct NoDecay {};

template <class C>
struct SomeDecay {
  C value;
};

template <class Place, class Vector>
SPARSEKERN_INLINE Vector add_decay(NoDecay, Place, Vector d, Vector) {
  return d;
}
template <class C, class Place, class Vector>
SPARSEKERN_INLINE Vector add_decay(SomeDecay<C> decay, Place, Vector d, Vector w) {
  return d + w * Vectors<C>::repeat(decay.value);
}

// Calls work(decay) with the decay that takes the fewest instructions.
template <class C, class Work>
SPARSEKERN_INLINE void with_known_decay(Same<C> decay, Work work) {
  decay.value == 0 ? work(NoDecay()) : work(SomeDecay<C>{decay.value});
}
template <class Decay, class Work>
SPARSEKERN_INLINE void with_known_decay(Decay decay, Work work) {
  work(decay);
}

// The fade of a masked row, whose elements do not change. Other fades multiply the new weight; a fade of 0 is the last
// one, and then weights and state become 0, even NaN.
constexpr int kMasked = -1;

// No element is masked or fading.
struct NoFade {
  bool masked(int64_t) const { return false; }
  template <class Place, class T>
  SPARSEKERN_INLINE T weight(Place, T updated, T) const {
    return updated;
  }
  template <class Place, class T>
  SPARSEKERN_INLINE T state(Place, T updated, T) const {
    return updated;
  }
};

// One fade for all elements, none of which is masked.
template <class C>
struct SameFade {
  C value;

  bool masked(int64_t) const { return false; }
  template <class Place, class T>
  SPARSEKERN_INLINE T weight(Place, T updated, T) const {
    return updated * value;
  }
  template <class Place, class T>
  SPARSEKERN_INLINE T state(Place, T updated, T) const {
    return updated;
  }
};

// A fade for each element; some may be masked and keep their old value.
template <class C, class Values>
struct RowFades {
  using Vector = typename Vectors<C>::Vector;
  Values values;

  bool masked(int64_t i) const { return values[i] < 0; }
  template <class Place>
  SPARSEKERN_INLINE Vector weight(Place place, Vector updated, Vector old) const {
    return state(place, updated * values.vector(place), old);
  }
  template <class Place>
  SPARSEKERN_INLINE Vector state(Place place, Vector updated, Vector old) const {
    return values.vector(place) < 0 ? old : updated;
  }
};

SPARSEKERN_END_ISA
