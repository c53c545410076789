// Work sharing: chunks of fixed extent handed to threads by a counter, so that results never depend on their number.
#pragma once

#include <cstdint>

namespace calseg {

// Runs body(context, chunk, thread) for every chunk in [0, num_chunks), on at most num_threads threads. body must not
// throw. Threads come from the OpenMP runtime that is already in the process (PyTorch's), so that its waiting threads
// are used instead of competed with; where there is none, or after a fork, threads are started for the call.
void parallel_for(int64_t num_chunks, int num_threads, void (*body)(void* context, int64_t chunk, int thread), void* context);

// "openmp", or "threads" where no OpenMP runtime is to be used
const char* threading_layer();

}  // namespace calseg
