#define SPARSEKERN_ISA baseline
#include "kernels.inc.h"
