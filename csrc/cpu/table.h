// Declarations of the kernels of one instruction set, for one type of arithmetic. Every operation defines its kernels in a source file of
// its own.
#pragma once

#include "host/arguments.h"

namespace calseg {
namespace CALSEG_ISA {

#define CALSEG_KERNEL(Args, name) extern const Kernel<Args> name;
CALSEG_KERNELS
#undef CALSEG_KERNEL

}  // namespace CALSEG_ISA
}  // namespace calseg
