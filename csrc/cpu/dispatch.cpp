#include "dispatch.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace sparsekern {

using ChunkFunction = void(const Job*, const Chunk*);
using FinishFunction = void(const Job*, int32_t);

// What the files of kernels/ define for an ISA, and its table.
#define SPARSEKERN_KERNELS_OF(isa)                                                               \
  namespace isa {                                                                                \
  ChunkFunction sgd_float32, sgd_float64, sgd_bfloat16, sgd_float16;                             \
  ChunkFunction adam_float32, adam_float64, adam_bfloat16, adam_float16;                         \
  ChunkFunction statistics_float32, statistics_float64, statistics_bfloat16, statistics_float16; \
  ChunkFunction mask_float32, mask_float64, mask_bfloat16, mask_float16;                         \
  FinishFunction finish_rows;                                                                    \
  extern const NormKernels norm_float32, norm_float64, norm_bfloat16, norm_float16;              \
  const Kernels kernels = {                                                                      \
      0,                                                                                         \
      {                                                                                          \
          {sgd_float32, sgd_float64, sgd_bfloat16, sgd_float16},                                 \
          {adam_float32, adam_float64, adam_bfloat16, adam_float16},                             \
          {statistics_float32, statistics_float64, statistics_bfloat16, statistics_float16},     \
          {mask_float32, mask_float64, mask_bfloat16, mask_float16},                             \
      },                                                                                         \
      finish_rows,                                                                               \
      {&norm_float32, &norm_float64, &norm_bfloat16, &norm_float16},                             \
  };                                                                                             \
  }

// The build says which ISAs its compiler knows; every compiler knows the baseline.
SPARSEKERN_KERNELS_OF(baseline)
#if defined(SPARSEKERN_HAS_V3)
SPARSEKERN_KERNELS_OF(v3)
#endif
#if defined(SPARSEKERN_HAS_V4)
SPARSEKERN_KERNELS_OF(v4)
#endif

namespace {

// The same kernels with statistics of long rows apart. On AMD's Zen 4 one loop for statistics and update takes 10 to
// 25 % longer than two, of which the second prefetches for the first. On Zen 5 the two take 10 to 40 % longer than one,
// and on Intel's Xeons up to 60 %.
[[maybe_unused]] Kernels with_statistics_apart(Kernels kernels) {
  kernels.apart = 1;
  return kernels;
}
#if defined(SPARSEKERN_HAS_V3)
const Kernels v3_apart = with_statistics_apart(v3::kernels);
#endif
#if defined(SPARSEKERN_HAS_V4)
const Kernels v4_apart = with_statistics_apart(v4::kernels);
#endif

struct Isa {
  const char* name;
  const Kernels& kernels;
  bool works;
};

#if defined(__x86_64__)
// Not all compilers know "f16c" as a name of __builtin_cpu_supports.
[[maybe_unused]] bool converts_float16() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

[[maybe_unused]] bool runs_v3() {
  __builtin_cpu_init();
  return converts_float16() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

[[maybe_unused]] bool runs_v4() {
  return runs_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// Whether two loops are faster than one.
[[maybe_unused]] bool is_amd_before_zen_5() {
  unsigned a = 0, b, c, d;
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &a, &b, &c, &d)) return false;
  const unsigned family = (a >> 8 & 0xf) + (a >> 20 & 0xff);
  return family < 0x1a;
}
#endif

}  // namespace

const Kernels& choose_kernels(const std::string& name, std::string& chosen) {
  // Best first.
  const Isa isas[] = {
#if defined(SPARSEKERN_HAS_V4)
      {"v4-apart", v4_apart, runs_v4() && (!name.empty() || is_amd_before_zen_5())},
      {"v4", v4::kernels, runs_v4()},
#endif
#if defined(SPARSEKERN_HAS_V3)
      {"v3-apart", v3_apart, runs_v3() && (!name.empty() || is_amd_before_zen_5())},
      {"v3", v3::kernels, runs_v3()},
#endif
      {"baseline", baseline::kernels, true},
  };
  std::string names;
  for (const Isa& isa : isas) {
    if (isa.works && (name.empty() || name == isa.name)) {
      chosen = isa.name;
      return isa.kernels;
    }
    if (isa.works) names += std::string(names.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("SPARSEKERN_CPU_ISA: got '" + name + "', expected one that this machine runs: " + names);
}

}  // namespace sparsekern
