#include "../isa/adam.h"

#include "chunk_function.h"

SPARSEKERN_CHUNK_FUNCTION(adam, Adam)
