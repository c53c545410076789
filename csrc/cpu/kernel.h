// Template that makes the three functions of a kernel from the class of an operation.
//
// The class of an operation has these members, where T is float or double:
//   Args                                           type of the arguments of a call
//   tiling<T>(args)                                division of the call into chunks and tiles
//   compute_chunk<T>(args, tiles, chunk, scratch)  work of a chunk. It first takes all of its scratch memory, and returns at
//                                                  once if scratch.is_counting().
#pragma once

#include <cstdint>

#include "cpu/scratch.h"
#include "cpu/table.h"
#include "cpu/tiling.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Base of the class of an operation, which gives it Args and a tiling: the tiles of kTensors tensors fill half of the first
// cache, and a chunk has about kLogits logits.
template <class ArgsOfCall, int kTensors, int kLogits>
struct TiledForFirstCache {
    using Args = ArgsOfCall;

    template <class T>
    static Tiling tiling(const Args& a) {
        return Tiling(a.shape, voxels_in_cache(a.shape.C, kTensors, sizeof(T)), kLogits);
    }
};

// Type of the arithmetic. The sources are compiled once for float and once for double, each time in another namespace.
using Real = CALSEG_REAL;

template <class Operation>
struct OperationKernel {
    using Args = typename Operation::Args;

    static int64_t num_chunks(const Args& args) { return Operation::template tiling<Real>(args).num_chunks(); }

    static int64_t scratch_bytes(const Args& args) { return compute(args, 0, nullptr); }
    static void compute_chunk(const Args& args, int64_t chunk, void* memory) { compute(args, chunk, memory); }

 private:
    // Computes a chunk, or only counts if there is no memory. Returns how many bytes of it the chunk takes.
    CALSEG_ONCE static int64_t compute(const Args& args, int64_t chunk, void* memory) {
        Scratch scratch(memory);
        Operation::template compute_chunk<Real>(args, Operation::template tiling<Real>(args), chunk, scratch);
        return scratch.bytes_taken();
    }
};

template <class Operation>
constexpr Kernel<typename Operation::Args> make_kernel() {
    using Of = OperationKernel<Operation>;
    return {Of::num_chunks, Of::scratch_bytes, Of::compute_chunk};
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
