// Memory pool for large results. Only Linux has one, other systems get stubs.
#include "host/buffer_pool.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <mutex>
#include <vector>
#endif

namespace calseg {

#if !defined(__linux__)

void* pool_allocate(std::size_t) { return nullptr; }
void pool_release(void*) {}
void pool_trim() {}
std::size_t pool_held_bytes() { return 0; }

#else

namespace {

constexpr std::size_t kHugePage = 2u << 20, kPage = 1u << 16;  // 64 KiB, the largest basic page of any processor

struct Block {
    void* memory;
    std::size_t bytes;
};

struct Pool {
    std::mutex mutex;
    std::vector<Block> free, used;
};
// Returns the pool, which is never destroyed, because tensors may outlive the static objects of the module. Around a fork
// its lock is held, so that the child does not inherit it in the hands of another thread.
Pool& pool() {
    static Pool* const instance = [] {
        auto* made = new Pool;
        pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
        return made;
    }();
    return *instance;
}

void unmap_all(std::vector<Block>& blocks) {
    for (const Block& block : blocks) munmap(block.memory, block.bytes);
    blocks.clear();
}

// Maps memory that starts at a huge page and asks for huge pages. Returns nullptr if the system has no memory.
void* map_huge(std::size_t bytes) {
    char* raw = static_cast<char*>(mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (raw == MAP_FAILED) return nullptr;
    char* aligned = reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(raw) + kHugePage - 1) / kHugePage * kHugePage);
    if (aligned > raw) munmap(raw, static_cast<std::size_t>(aligned - raw));
    if (const std::size_t tail = static_cast<std::size_t>(raw + kHugePage - aligned)) munmap(aligned + bytes, tail);
    madvise(aligned, bytes, MADV_HUGEPAGE);
    return aligned;
}

}  // namespace

void* pool_allocate(std::size_t bytes) {
    bytes = (bytes + kPage - 1) / kPage * kPage;
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    p.used.reserve(p.used.size() + 1);
    p.free.reserve(p.free.size() + p.used.size() + 1);  // so that pool_release() needs no memory
    auto best = p.free.end();
    for (auto it = p.free.begin(); it != p.free.end(); ++it)
        if (it->bytes >= bytes && it->bytes <= bytes + bytes / 4 && (best == p.free.end() || it->bytes < best->bytes)) best = it;
    if (best != p.free.end()) {
        p.used.push_back(*best);
        p.free.erase(best);
        return p.used.back().memory;
    }
    // No free block fits, so the sizes have changed. Return all free blocks to the system. So the pool never holds more
    // than was in use at one time.
    unmap_all(p.free);
    void* memory = map_huge(bytes);
    if (memory) p.used.push_back({memory, bytes});
    return memory;
}

void pool_release(void* memory) {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    for (auto it = p.used.begin(); it != p.used.end(); ++it)
        if (it->memory == memory) {
            p.free.push_back(*it);
            p.used.erase(it);
            return;
        }
}

void pool_trim() {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    unmap_all(p.free);
}

std::size_t pool_held_bytes() {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    std::size_t bytes = 0;
    for (const Block& block : p.free) bytes += block.bytes;
    return bytes;
}

#endif

}  // namespace calseg
