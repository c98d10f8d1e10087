#define SPARSEKERN_ISA v4
#include "isa/kernels.h"
