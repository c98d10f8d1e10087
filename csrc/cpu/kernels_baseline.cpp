#define SPARSEKERN_ISA baseline
#include "isa/kernels.h"
