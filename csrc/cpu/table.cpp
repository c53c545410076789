// Table of all kernels of one instruction set, for one type of arithmetic.
#include "cpu/table.h"

namespace calseg {
namespace CALSEG_ISA {

#define CALSEG_KERNEL(Args, name) name,
const KernelTable kernels = {CALSEG_KERNELS};
#undef CALSEG_KERNEL

}  // namespace CALSEG_ISA
}  // namespace calseg
