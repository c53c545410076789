// Choice of the instruction set whose kernels are used.
#pragma once

#include <string>
#include <vector>

#include "host/arguments.h"

namespace calseg {

// Returns the kernels in use for scores of a dtype. They are those of the best instruction set of the processor, unless the
// environment variable CALSEG_ISA or set_isa() chose another one.
const KernelTable& kernels(DType scores);

// Returns the name of the instruction set in use.
const char* isa();

// Returns the names of the instruction sets that were built and that this processor has, best first.
std::vector<std::string> available_isas();

// Chooses an instruction set. Throws std::invalid_argument if it is not available.
void set_isa(const std::string& name);

}  // namespace calseg
