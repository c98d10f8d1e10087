#define SPARSEKERN_ISA v3
#include "isa/kernels.h"
