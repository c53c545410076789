// Values that stand in place of a class.
#pragma once

#include <cstdint>

namespace calseg {
namespace CALSEG_ISA {
namespace {

constexpr int32_t kSkipped = -1;  // the voxel does not count
constexpr int32_t kNoClass = -2;  // the label is not a class

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
