// Numbers that go with the elements of a loop (decays, fades, thresholds), for one element or for a vector of them.
#pragma once

#include "lanes.h"

SPARSEKERN_BEGIN_ISA

// The same for all ...
template <class C>
struct Same {
  using Vector = typename Vectors<C>::Vector;
  C value;

  C operator[](int64_t) const { return value; }
  SPARSEKERN_INLINE Vector vector(int64_t) const { return Vectors<C>::repeat(value); }
};

// ... one for each ...
template <class C>
struct Each {
  using Vector = typename Vectors<C>::Vector;
  const C* __restrict value;

  C operator[](int64_t i) const { return value[i]; }
  SPARSEKERN_INLINE Vector vector(int64_t i) const { return Vectors<C>::load(value + i); }
};

// ... or one for every four, where rows are so short: a quarter of the memory, and what a tile needs stays in the
// first-level cache.
template <class C>
struct EachFour {
  using Vector = typename Vectors<C>::Vector;
  const C* __restrict value;

  C operator[](int64_t i) const { return value[i / 4]; }
  SPARSEKERN_INLINE Vector vector(int64_t i) const { return Vectors<C>::fourfold(value + i / 4); }
};

// No weight decay on the gradient: adding 0 times the weight would make NaN of an infinite one.
template <class C>
struct NoDecay {
  using Vector = typename Vectors<C>::Vector;

  C operator[](int64_t) const { return 0; }
  SPARSEKERN_INLINE Vector vector(int64_t) const { return Vector{}; }
};

template <class C>
inline bool is_nothing(Same<C> decay) {
  return decay.value == 0;
}
template <class Decay>
inline bool is_nothing(Decay) {
  return false;
}

template <class T>
constexpr bool kDecays = true;
template <class C>
constexpr bool kDecays<NoDecay<C>> = false;

// Fade of a masked row, whose elements stay as they are. Of others it multiplies the new weight; 0 ends a fade,
// and then weights and state are set to 0, whatever they were.
constexpr int kMasked = -1;

// What a fade makes of an updated element: of rows none of which is masked ...
template <class C>
struct SameFade {
  C value;

  template <class T>
  SPARSEKERN_INLINE T weight(int64_t, T updated, T) const {
    return updated * value;
  }
  template <class T>
  SPARSEKERN_INLINE T state(int64_t, T updated, T) const {
    return updated;
  }
};

template <class Fade>
constexpr bool kAlike = false;
template <class C>
constexpr bool kAlike<SameFade<C>> = true;

// ... or with masked ones among them.
template <class C, class Values>
struct RowFades {
  using Vector = typename Vectors<C>::Vector;
  Values values;

  C weight(int64_t i, C updated, C old) const { return state(i, updated * values[i], old); }
  C state(int64_t i, C updated, C old) const { return values[i] < 0 ? old : updated; }
  SPARSEKERN_INLINE Vector weight(int64_t i, Vector updated, Vector old) const {
    return state(i, updated * values.vector(i), old);
  }
  SPARSEKERN_INLINE Vector state(int64_t i, Vector updated, Vector old) const {
    return values.vector(i) < 0 ? old : updated;
  }
};

SPARSEKERN_END_ISA
