// What the kernels of cross-entropy share: where a block begins, the upstream gradient, and the sum of the block's losses.
#pragma once

#include "cuda/thread.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

CALSEG_INLINE uint32_t operator/(uint32_t number, QuickDivisor by) {
    return static_cast<uint32_t>(static_cast<uint64_t>(number) * by.multiplier >> 31) >> by.shift;
}

// The tile of a block.
struct BlockTile {
    unsigned n;     // batch item
    int64_t first;  // first voxel
    int voxels;     // number of voxels

    explicit CALSEG_MEMBER BlockTile(const CrossEntropyLaunch& launch) : n(static_cast<uint32_t>(blockIdx.x) / launch.per_item) {
        const unsigned of_item = blockIdx.x - n * launch.tiles_per_item;
        first = static_cast<int64_t>(of_item) * launch.tile;
        voxels = of_item + 1 == launch.tiles_per_item ? launch.last_tile : launch.tile;
    }
};

// Factor of the loss, and the upstream gradient of every voxel.
struct Factors {
    float of_loss, upstream;

    explicit CALSEG_MEMBER Factors(const CrossEntropyLaunch& launch)
        : of_loss(launch.factor ? launch.scale * *launch.factor : launch.scale),
          upstream(launch.divisor ? of_loss * reciprocal(*launch.divisor) : of_loss) {}
};

// Stores the sum of the losses of a block of `kThreads` threads, given that of each thread. `of_warps` is shared memory.
template <int kThreads>
CALSEG_INLINE void store_partial(const CrossEntropyLaunch& launch, float loss, float* of_warps) {
    for (int step = kCudaWarp / 2; step > 0; step /= 2) loss += __shfl_down_sync(kAllLanes, loss, step);
    if (lane() == 0) of_warps[warp()] = loss;
    __syncthreads();
    if (threadIdx.x == 0 && launch.partials) {
        float sum = 0.0f;
        for (int w = 0; w < kThreads / kCudaWarp; ++w) sum += of_warps[w];
        launch.partials[blockIdx.x] = sum;
    }
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
