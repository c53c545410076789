// Which instruction set's kernels run.
#pragma once

#include <string>
#include <vector>

#include "host/arguments.h"

namespace calseg {

// The kernels in use: the best that the processor has, or what CALSEG_ISA or set_isa chose.
const KernelTable& kernels();
const char* isa();
std::vector<std::string> available_isas();  // built and supported here, best first
void set_isa(const std::string& name);      // throws std::invalid_argument

}  // namespace calseg
