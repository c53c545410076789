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

struct Work {
    int64_t num_chunks;
    void (*body)(void*, int64_t, int);
    void* context;
    std::atomic<int64_t> next_chunk{0};
    std::atomic<int> next_thread{0};

    void run() {
        const int thread = next_thread.fetch_add(1, std::memory_order_relaxed);
        for (int64_t chunk; (chunk = next_chunk.fetch_add(1, std::memory_order_relaxed)) < num_chunks;) body(context, chunk, thread);
    }
};

void run_work(void* work) { static_cast<Work*>(work)->run(); }

#if defined(_WIN32)
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
Parallel openmp_parallel() { return nullptr; }
#else
// The entry point of GNU's and LLVM's OpenMP runtimes for a parallel region.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// A forked child inherits the runtime's memory but not its threads: its next parallel region would wait for ever.
std::atomic<bool> forked{false};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

Parallel openmp_parallel() {
    static const Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return forked ? nullptr : parallel;
}
#endif

void run_on_new_threads(Work& work, int num_threads) {
    std::vector<std::thread> threads;
    try {
        threads.reserve(static_cast<size_t>(num_threads - 1));
        for (int i = 1; i < num_threads; ++i) threads.emplace_back(run_work, &work);
    } catch (const std::exception&) {
        // fewer threads than asked for (a limit of the system): the others take their chunks
    }
    work.run();
    for (auto& thread : threads) thread.join();
}

}  // namespace

void parallel_for(int64_t num_chunks, int num_threads, void (*body)(void*, int64_t, int), void* context) {
    Work work{num_chunks, body, context};
    if (num_chunks < num_threads) num_threads = static_cast<int>(num_chunks);
    if (num_threads <= 1) return work.run();
    if (const Parallel parallel = openmp_parallel()) return parallel(run_work, &work, static_cast<unsigned>(num_threads), 0);
    run_on_new_threads(work, num_threads);
}

const char* threading_layer() { return openmp_parallel() ? "openmp" : "threads"; }

}  // namespace calseg
