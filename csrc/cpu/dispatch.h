// Which instruction sets there are, and the kernels of each.
#pragma once

#include <string>

#include "../abi.h"

namespace sparsekern {

// The kernels of `name`, or of the best ISA of this machine when it is empty. Throws std::invalid_argument for a
// name that does not exist or that this machine cannot run. `chosen` receives the name.
const Kernels& choose_kernels(const std::string& name, std::string& chosen);

}  // namespace sparsekern
