// Kernels of one instruction set. Every operation has a source file; table.cpp gathers them.
#pragma once

#include "host/arguments.h"

namespace calseg {
namespace CALSEG_ISA {

#define CALSEG_KERNEL(Args, name) extern const Kernel<Args> name;
CALSEG_KERNELS
#undef CALSEG_KERNEL

}  // namespace CALSEG_ISA
}  // namespace calseg
