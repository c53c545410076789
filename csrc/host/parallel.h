// Loop over chunks that runs on several threads. A counter hands the chunks out, one at a time.
#pragma once

#include <cstdint>

namespace calseg {

// Calls body(context, chunk, thread) for every chunk in [0, num_chunks), on at most num_threads threads. The body must not
// throw.
//
// The threads are those of the OpenMP runtime that PyTorch has loaded. New threads would compete with them, because they
// keep a processor busy while they wait for work. If there is no OpenMP runtime, or after a fork, new threads are started
// for the call.
void parallel_for(int64_t num_chunks, int num_threads, void (*body)(void* context, int64_t chunk, int thread), void* context);

// Returns "openmp" if the threads are those of an OpenMP runtime, else "threads".
const char* threading_layer();

}  // namespace calseg
