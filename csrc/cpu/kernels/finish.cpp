// The rows of a tensor after its last chunk, for one ISA: row arrays are float32 whatever the dtype.
#include "../isa/finish_rows.h"

namespace sparsekern {
namespace SPARSEKERN_ISA {

void finish_rows(const Job* job, int32_t tensor) {
  finish(job, tensor);
}

}  // namespace SPARSEKERN_ISA
}  // namespace sparsekern
