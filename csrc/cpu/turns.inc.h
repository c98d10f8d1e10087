// Loops that take the statistics of elements and update them in turns: the sums are added up while the dividers are
// busy with the elements before.

// How far ahead of the arithmetic memory is asked for, in elements. Statistics lengthen the loop, and with it the time
// that the machine's own prefetcher needs to see that it goes on.
constexpr int64_t kAhead = 128, kAheadInTurns = 96;

// Where one loop in whole vectors has room for statistics and update in the registers.
template <class C>
constexpr bool kInTurns = kVectorBytes == 64 && sizeof(C) == 4;

// Updates n elements of kArrays arrays, the first of them the weights, in whole vectors. Returns how many elements
// those were. `update(i, old, d, updated)` gets the vectors of the arrays and of the gradient at element i.
//
// The next vectors are loaded before these are stored: a load waits for an earlier store whose address differs from its
// own in the upper bits alone, and tensors often lie like that.
template <class S, class C, int kArrays, class Statistics, class Update>
SPARSEKERN_INLINE int64_t in_turns(int64_t n, S* const (&arrays)[kArrays], const C* __restrict ds,
                                   Statistics statistics, Update update) {
  using V = Vectors<C>;
  using Vector = typename V::Vector;
  if (n < V::kWidth) return 0;
  auto local = statistics.begin();
  Vector old[kArrays], d = V::load(ds);
#pragma GCC unroll 4
  for (int a = 0; a < kArrays; ++a) old[a] = V::load(arrays[a]);
  int64_t i = 0, next = 0;
  for (; i + V::kWidth <= n; i = next) {
    // The last turn loads once more what it has.
    next = i + V::kWidth;
    const int64_t from = next + V::kWidth <= n ? next : i;
    __builtin_prefetch(ds + i + kAheadInTurns);
#pragma GCC unroll 4
    for (int a = 0; a < kArrays; ++a) __builtin_prefetch(arrays[a] + i + kAheadInTurns);
    statistics.add_vector(local, i, old[0], d);
    Vector updated[kArrays];
    update(i, old, d, updated);
    d = V::load(ds + from);
#pragma GCC unroll 4
    for (int a = 0; a < kArrays; ++a) old[a] = V::load(arrays[a] + from);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
#pragma GCC unroll 4
    for (int a = 0; a < kArrays; ++a) V::store(updated[a], arrays[a] + i);
  }
  statistics.end(local);
  return i;
}

// Calls element(i) for every i below n.
template <class S, class C, class Prefetch, class Element>
SPARSEKERN_INLINE void for_elements(int64_t n, const S*, const C*, NoStatistics, Prefetch, Element element) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) element(i);
}

// The same in turns with the statistics.
template <class S, class C, class Statistics, class Prefetch, class Element>
SPARSEKERN_INLINE void for_elements(int64_t n, const S* w, const C* d, Statistics statistics, Prefetch prefetch,
                                    Element element) {
  auto local = statistics.begin();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    prefetch(i + kAhead);
    statistics.add(local, i, w + i, d + i);
#pragma GCC ivdep
    for (int64_t l = 0; l < kLanes; ++l) element(i + l);
  }
  if (i < n) {
    statistics.add_last(local, i, w + i, d + i, n - i);
#pragma GCC ivdep
    for (; i < n; ++i) element(i);
  }
  statistics.end(local);
}
