// The part of the Python module that watches what an optimizer's lists were made from.
#pragma once

#include <pybind11/pybind11.h>

namespace sparsekern {

void define_sources(pybind11::module_& module);

}  // namespace sparsekern
