#include "host/parallel.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace calseg {
namespace {

// State of a call of parallel_for(), which its threads share.
struct Work {
    int64_t num_chunks;
    void (*body)(void*, int64_t, int);
    void* context;
    std::atomic<int64_t> next_chunk{0};
    std::atomic<int> next_thread{0};

    // Takes chunks until none is left. Every thread of the call does this once.
    void take_chunks() {
        const int thread = next_thread.fetch_add(1, std::memory_order_relaxed);
        for (int64_t chunk; (chunk = next_chunk.fetch_add(1, std::memory_order_relaxed)) < num_chunks;) body(context, chunk, thread);
    }
};

void take_chunks_of(void* work) { static_cast<Work*>(work)->take_chunks(); }

#if defined(_WIN32)
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
Parallel openmp_parallel() { return nullptr; }
#else
// Type of GOMP_parallel, the function by which GNU's and LLVM's OpenMP runtimes start a parallel region.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Whether this process is a forked child. A child inherits the memory of the OpenMP runtime but not its threads, so its
// next parallel region would never end.
std::atomic<bool> forked{false};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Returns a function of the process, or of the libraries that PyTorch has brought along for itself: its OpenMP runtime is
// one of these in the wheels for aarch64.
void* find_symbol(const char* name) {
    if (void* found = dlsym(RTLD_DEFAULT, name)) return found;
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch ? dlsym(torch, name) : nullptr;
}

// Returns GOMP_parallel, or nullptr if it must not be used.
Parallel openmp_parallel() {
    static const Parallel parallel = reinterpret_cast<Parallel>(find_symbol("GOMP_parallel"));
    return forked ? nullptr : parallel;
}
#endif

void start_threads_for(Work& work, int num_threads) {
    std::vector<std::thread> threads;
    try {
        threads.reserve(static_cast<size_t>(num_threads - 1));
        for (int i = 1; i < num_threads; ++i) threads.emplace_back(take_chunks_of, &work);
    } catch (const std::exception&) {
        // The system allows no more threads. Those that were started take all chunks.
    }
    work.take_chunks();
    for (auto& thread : threads) thread.join();
}

}  // namespace

void parallel_for(int64_t num_chunks, int num_threads, void (*body)(void*, int64_t, int), void* context) {
    Work work{num_chunks, body, context};
    if (num_chunks < num_threads) num_threads = static_cast<int>(num_chunks);
    if (num_threads <= 1) return work.take_chunks();
    if (const Parallel parallel = openmp_parallel()) return parallel(take_chunks_of, &work, static_cast<unsigned>(num_threads), 0);
    start_threads_for(work, num_threads);
}

const char* threading_layer() { return openmp_parallel() ? "openmp" : "threads"; }

}  // namespace calseg
