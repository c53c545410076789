// Pool of memory for large results, which is kept between calls and lies on huge pages.
//
// Every training step frees a gradient of the logits' size and allocates it again. The C library returns such a block to
// the system. The page faults of a fresh block of 4 KiB pages take several times as long as computing the gradient.
#pragma once

#include <cstddef>

namespace calseg {

constexpr std::size_t kPooledBytes = 4u << 20;  // size from which a result should come from the pool

void* pool_allocate(std::size_t bytes);  // returns nullptr if memory is short or the system has no pool
void pool_release(void* memory);
void pool_trim();               // returns the memory that is not in use to the system
std::size_t pool_held_bytes();  // returns the size of the memory that is kept and not in use

}  // namespace calseg
