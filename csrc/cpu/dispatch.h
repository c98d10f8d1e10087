// Selects the kernels of an instruction set at run time.
#pragma once

#include <string>

#include "../abi.h"

namespace sparsekern {

// Returns the kernels of ISA `name`, or of the fastest ISA of this machine if `name` is empty, and stores its name in
// `chosen`. Throws std::invalid_argument if `name` is unknown or this machine cannot run it.
const Kernels& choose_kernels(const std::string& name, std::string& chosen);

}  // namespace sparsekern
