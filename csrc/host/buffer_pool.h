// Memory for large results, kept between calls and on huge pages.
//
// A gradient of the logits' size is freed and asked for again in every training step. The C library gives such blocks
// back to the system, and faulting in fresh 4 KiB pages takes several times as long as computing the gradient.
#pragma once

#include <cstddef>

namespace calseg {

constexpr std::size_t kPooledBytes = 4u << 20;  // smaller blocks are the allocator's business

void* pool_allocate(std::size_t bytes);  // nullptr where there is no such memory (or no pool on this system)
void pool_release(void* memory);
void pool_trim();               // gives what is not in use back to the system
std::size_t pool_held_bytes();  // kept and not in use

}  // namespace calseg
