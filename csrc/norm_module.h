// The part of the Python module for batch normalisation with its activation.
#pragma once

#include <pybind11/pybind11.h>

namespace sparsekern {

void define_norm(pybind11::module_& module);

}  // namespace sparsekern
