// The kernels of this instruction set, each from a source file of its own.
#include "cpu/operations.h"

namespace calseg {
namespace CALSEG_ISA {

const KernelTable kernels = {
#define CALSEG_KERNEL(Args, name) name,
    CALSEG_KERNELS
#undef CALSEG_KERNEL
};

}  // namespace CALSEG_ISA
}  // namespace calseg
