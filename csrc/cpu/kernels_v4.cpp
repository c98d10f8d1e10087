#define SPARSEKERN_ISA v4
#include "kernels.inc.h"
