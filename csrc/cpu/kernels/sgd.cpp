#include "../isa/sgd.h"

#include "chunk_function.h"

SPARSEKERN_CHUNK_FUNCTION(sgd, Sgd)
