// calibration_bins on a GPU: the call, and what the host decides of its launch. Plain C++, tested without a GPU.
#pragma once

#include <cstdint>

#include "host/arguments.h"

namespace calseg {

constexpr int kCudaWarp = 32, kCudaThreads = 256, kCudaWarps = kCudaThreads / kCudaWarp;
constexpr int kCudaResident = 3;      // blocks that fit a multiprocessor at least, by their registers
constexpr int64_t kMostVoxels = 127;  // of a thread: 32 bits hold that many scores of up to 2^25

struct CudaLimits {
    int64_t multiprocessors;
    int64_t shared_per_multiprocessor, shared_per_block;  // bytes; of a block, the most that it may ask for
};

// Where a block adds up its bins.
enum class BinsIn : int32_t {
    columns,  // shared memory, one set for every thread: no two threads meet
    shared,   // shared memory, one set for the block
    global,   // the call's sums
};

// A label is compared as the unsigned number that its bits are.
struct LabelRange {
    int bytes = 1;
    uint64_t classes = 0;  // labels from here on are no class
    uint64_t ignored = 0;
    bool ignores = false;  // whether a label can equal ignored
};

struct CalibrationLaunch {
    BinsArgs args;  // items merged where one stride walks all
    LabelRange labels;
    BinsIn bins_in = BinsIn::global;
    int classes_held = 0;        // by a thread at once, of voxels_held(classes_held) voxels
    bool transposed = false;     // lanes read along the classes, and hand the voxels round in shared memory
    int64_t bins = 0;            // of an item
    int64_t tiles_per_item = 0;  // a tile: kCudaThreads * voxels_held(classes_held) voxels, of one item
    int64_t groups = 0;          // of tiles that add to the same sums: items if per_item, else 1
    int64_t tiles_per_group = 0;
    int64_t blocks_per_group = 0;
    int64_t bins_offset = 0, rows_offset = 0, shared_bytes = 0;  // of a block's shared memory: totals, bins, transposed rows
    int64_t* faults = nullptr;  // in and out [2]: the first voxel whose label is no class, whose scores are no probabilities

    int64_t blocks() const { return groups * blocks_per_group; }
};

// 16 scores of a thread are on their way at once
constexpr int voxels_held(int classes_held) { return classes_held >= 16 ? 1 : 4; }

// The memory of a block, and the tiles; an empty call has none.
CalibrationLaunch calibration_launch(const BinsArgs& args, const CudaLimits& limits);

// The number of blocks: one wave of the GPU, where `resident` blocks fit a multiprocessor at once; more for large calls.
void set_blocks(CalibrationLaunch& launch, const CudaLimits& limits, int64_t resident);

// Adds to args.sums and args.totals, and lowers the faults, all on the device: [2] as in CalibrationLaunch. Returns when
// the kernel is queued on the stream. Throws std::runtime_error with CUDA's reason.
void cuda_calibration_bins(const BinsArgs& args, int64_t* faults, int device, void* stream);

}  // namespace calseg
