// Table of this instruction set's kernels.
#include "cpu/table.h"

namespace calseg {
namespace CALSEG_ISA {

#define CALSEG_NAME(name, Args) name,
const KernelTable kernels = {CALSEG_OPERATIONS(CALSEG_NAME)};
#undef CALSEG_NAME

}  // namespace CALSEG_ISA
}  // namespace calseg
