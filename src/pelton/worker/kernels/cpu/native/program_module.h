#pragma once

#include <nanobind/nanobind.h>

namespace pelton {

void bind_program(nanobind::module_& module);

}  // namespace pelton
