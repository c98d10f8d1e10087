#include "../isa/external.h"

#include "chunk_function.h"

SPARSEKERN_CHUNK_FUNCTION(statistics, ExternalStatistics)
SPARSEKERN_CHUNK_FUNCTION(mask, ExternalMask)
