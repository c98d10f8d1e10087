#include "dispatch.h"

#include <stdexcept>

namespace sparsekern {

namespace baseline {
extern const Kernels kernels;
}

#if defined(__x86_64__)
namespace v3 {
extern const Kernels kernels;
}
namespace v4 {
extern const Kernels kernels;
}
#endif

namespace {

struct Isa {
  const char* name;
  const Kernels& kernels;
  bool works;
};

}  // namespace

const Kernels& choose_kernels(const std::string& name, std::string& chosen) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3_works = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4_works = v3_works && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
#endif
  // Best first.
  const Isa isas[] = {
#if defined(__x86_64__)
      {"v4", v4::kernels, v4_works},
      {"v3", v3::kernels, v3_works},
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
