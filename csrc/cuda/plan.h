// Launch of calibration_bins on a GPU, as the host decides it. Plain C++, tested without a GPU.
#pragma once

#include <cstdint>

#include "host/arguments.h"

namespace calseg {

constexpr int kCudaWarp = 32, kCudaThreads = 256, kCudaWarps = kCudaThreads / kCudaWarp;
constexpr int kCudaResident = 3;      // blocks whose registers fit a multiprocessor at once, at least
constexpr int64_t kMostVoxels = 127;  // of a thread: 32 bits hold the sum of that many scores of up to 2^25

struct CudaLimits {
    int64_t multiprocessors;
    int64_t shared_per_multiprocessor, shared_per_block;  // bytes; the most that a block may ask for
};

// Place where a block adds up its bins.
enum class BinsIn : int32_t {
    columns,  // shared memory, one set for every thread: no two threads add to one place
    shared,   // shared memory, one set for the block
    global,   // the call's sums
};

// Comparison of labels as the unsigned numbers that their bits are.
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
    int classes_held = 0;        // classes that a thread holds at once, of voxels_held(classes_held) voxels
    bool transposed = false;     // lanes read along the classes, and exchange the voxels in shared memory
    int64_t bins = 0;            // bins of an item
    int64_t tiles_per_item = 0;  // a tile is kCudaThreads * voxels_held(classes_held) voxels of one item
    int64_t groups = 0;          // a group is the tiles that add to the same sums: those of an item if per_item, else all
    int64_t tiles_per_group = 0;
    int64_t blocks_per_group = 0;
    int64_t bins_offset = 0, rows_offset = 0, shared_bytes = 0;  // a block's shared memory is totals, bins, transposed rows
    int64_t* faults = nullptr;  // in and out [2]: the first voxels whose label is no class, and whose scores are no probabilities

    int64_t blocks() const { return groups * blocks_per_group; }
};

// Number of voxels that a thread holds at once: 16 of its scores are on their way from memory.
constexpr int voxels_held(int classes_held) { return classes_held >= 16 ? 1 : 4; }

// Decides the shared memory of a block and the tiles. An empty call has no tiles.
CalibrationLaunch calibration_launch(const BinsArgs& args, const CudaLimits& limits);

// Decides the number of blocks: one wave of a GPU on which `resident` blocks fit a multiprocessor at once, more for large
// calls.
void set_blocks(CalibrationLaunch& launch, const CudaLimits& limits, int64_t resident);

// Adds to args.sums and args.totals, and lowers the faults, which are those of CalibrationLaunch. All three are memory of the
// device. Returns when the kernel is queued on the stream. Throws std::runtime_error with CUDA's reason.
void cuda_calibration_bins(const BinsArgs& args, int64_t* faults, int device, void* stream);

}  // namespace calseg
