// The part of the Python module that normalises.
#pragma once

#include <pybind11/pybind11.h>

namespace sparsekern {

void define_norm(pybind11::module_& module);

}  // namespace sparsekern
