// Scratch memory of a chunk, from which code takes rows that start on a cache line.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Allocator of the rows. Without memory (null), it only counts the bytes of the rows taken. Such rows must not be read or
// written. The same code thus says how much memory it needs and takes that memory.
class Scratch {
 public:
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
