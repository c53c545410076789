// Scratch memory of a chunk, handed out in rows that start on a cache line.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Without memory it counts the bytes of the rows, which must not be touched then. So the code that takes the rows is also
// the description of how many bytes they need.
class Scratch {
 public:
    Scratch() = default;
    explicit Scratch(void* memory) : first_(reinterpret_cast<uintptr_t>(memory)) {}

    template <class T>
    T* take(int64_t count) {
        T* row = reinterpret_cast<T*>(first_ + taken_);
        taken_ += static_cast<uintptr_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
        return row;
    }

    bool is_counting() const { return first_ == 0; }
    int64_t bytes_taken() const { return static_cast<int64_t>(taken_); }

 private:
    uintptr_t first_ = 0, taken_ = 0;
};

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
