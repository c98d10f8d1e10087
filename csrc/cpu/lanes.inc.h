// The four sums of a row in sixteen lanes, in as many vectors of this ISA as that takes.

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr int kLanes = 16;

// Whether one loop takes the statistics and makes the update: only where the registers suffice for both.
constexpr bool kFuses = kVectorBytes == 64;

// For what works on sums: they are in registers only where the compiler sees all that is done to them.
#define SPARSEKERN_ALWAYS __attribute__((always_inline))
#define SPARSEKERN_INLINE SPARSEKERN_ALWAYS inline

template <class C>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using Type = int32_t;
};
template <>
struct IntegerOf<double> {
  using Type = int64_t;
};

template <class C>
struct Vectors {
  static constexpr int kWidth = kVectorBytes / sizeof(C);

  using Integer = typename IntegerOf<C>::Type;
  typedef C Vector __attribute__((vector_size(kVectorBytes)));
  typedef Integer Integers __attribute__((vector_size(kVectorBytes)));

  static Vector load(const C* from) {
    Vector vector;
    __builtin_memcpy(&vector, from, sizeof(vector));
    return vector;
  }

  static Vector load(const BFloat16* from) {
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
    Halves halves;
    __builtin_memcpy(&halves, from, sizeof(halves));
    return (Vector)(__builtin_convertvector(halves, Integers) << 16);
  }

  // Elements from `count` on become 0, whatever stands there.
  static Vector first(Vector vector, int64_t count) {
    Integers index;
    for (int l = 0; l < kWidth; ++l) index[l] = l;
    return (Vector)((Integers)vector & (index < Integer(count)));
  }

  // 1 where the absolute value exceeds the threshold, else 0.
  static Vector exceeds(Vector vector, C threshold) {
    constexpr Integer kMagnitude = ~(Integer(1) << (sizeof(C) * 8 - 1));
    const Vector one = Vector{} + C(1);
    return (Vector)((Integers)one & ((Vector)((Integers)vector & kMagnitude) > threshold));
  }
};

template <class C, int kVectors>
struct LanesOf;

template <class C>
struct LanesOf<C, 0> {
  template <class S>
  void add(const S*, const C*, C) {}
  template <class S>
  void add_first(const S*, const C*, int64_t, C) {}
  void store(C*, C*, C*, C*) const {}
};

// One vector after the other by recursion: an array of vectors would live in memory and not in registers.
template <class C, int kVectors>
struct LanesOf : LanesOf<C, kVectors - 1> {
  using V = Vectors<C>;
  using Rest = LanesOf<C, kVectors - 1>;

  typename V::Vector count = {}, dot = {}, grad_sq = {}, weight_sq = {};

  template <class S>
  SPARSEKERN_INLINE void add(const S* w, const C* d, C threshold) {
    add_vector(V::load(w), V::load(d), threshold);
    Rest::add(w + V::kWidth, d + V::kWidth, threshold);
  }

  // The first `n` of sixteen elements.
  template <class S>
  SPARSEKERN_INLINE void add_first(const S* w, const C* d, int64_t n, C threshold) {
    add_vector(V::first(V::load(w), n), V::first(V::load(d), n), threshold);
    Rest::add_first(w + V::kWidth, d + V::kWidth, n - V::kWidth, threshold);
  }

  SPARSEKERN_INLINE void store(C* counts, C* dots, C* grad_sqs, C* weight_sqs) const {
    __builtin_memcpy(counts, &count, kVectorBytes);
    __builtin_memcpy(dots, &dot, kVectorBytes);
    __builtin_memcpy(grad_sqs, &grad_sq, kVectorBytes);
    __builtin_memcpy(weight_sqs, &weight_sq, kVectorBytes);
    constexpr int w = V::kWidth;
    Rest::store(counts + w, dots + w, grad_sqs + w, weight_sqs + w);
  }

 private:
  SPARSEKERN_INLINE void add_vector(typename V::Vector w, typename V::Vector d, C threshold) {
    count += V::exceeds(d, threshold);
    dot += w * d;
    grad_sq += d * d;
    weight_sq += w * w;
  }
};

template <class C>
using Lanes = LanesOf<C, kLanes * sizeof(C) / kVectorBytes>;
