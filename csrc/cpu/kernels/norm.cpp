// Normalisation with its activation, for one ISA and one dtype.
#include "../isa/norm.h"

#include "../isa/norm_sums.h"
#include "chunk_function.h"

// By activation, in the order of abi.h.
#define SPARSEKERN_FOR_ACTIVATIONS(of) {of(Identity), of(Relu), of(Relu6), of(Hardswish), of(Silu)}
#define SPARSEKERN_FORWARD(Act) norm_pass<Forward, Element, Act>
#define SPARSEKERN_SUMS(Act) norm_grad_sums<Element, Act>
#define SPARSEKERN_BACKWARD(Act) norm_pass<Backward, Element, Act>

namespace sparsekern {
namespace SPARSEKERN_ISA {

extern const NormKernels SPARSEKERN_WITH_DTYPE(norm, SPARSEKERN_DTYPE);
const NormKernels SPARSEKERN_WITH_DTYPE(norm, SPARSEKERN_DTYPE) = {
    norm_moments<Element>,
    SPARSEKERN_FOR_ACTIVATIONS(SPARSEKERN_FORWARD),
    SPARSEKERN_FOR_ACTIVATIONS(SPARSEKERN_SUMS),
    SPARSEKERN_FOR_ACTIVATIONS(SPARSEKERN_BACKWARD),
};

}  // namespace SPARSEKERN_ISA
}  // namespace sparsekern
