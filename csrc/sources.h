// The part of the Python module that checks whether an optimizer's parameters, gradients and state are still the
// objects that its lists were made from.
#pragma once

#include <pybind11/pybind11.h>

namespace sparsekern {

void define_sources(pybind11::module_& module);

}  // namespace sparsekern
