// Plans of launches on a GPU. They are made in plain C++, so tests check them without a GPU.
#pragma once

#include <cstdint>

#include "host/arguments.h"

namespace calseg {

constexpr int kCudaWarp = 32, kCudaThreads = 256, kCudaWarps = kCudaThreads / kCudaWarp;
constexpr int kCudaResident = 3;      // least number of blocks whose registers must fit a multiprocessor at once
constexpr int64_t kMostVoxels = 127;  // most voxels of a thread: 32 bits hold the sum of that many numbers of up to 2^25

// Numbers with which labels of any integer dtype are compared, after their bits are read as an unsigned number.
struct LabelRange {
    int bytes = 1;               // size of a label
    uint64_t classes = 0;        // labels below this number are classes
    uint64_t ignored = 0;        // label of ignored voxels
    bool ignores = false;        // whether a label of the dtype can equal ignore_index
    bool ignores_class = false;  // whether that label is below `classes`
};

// ---- calibration_bins ----

// Properties of a GPU.
struct CudaLimits {
    int64_t multiprocessors;            // number of multiprocessors
    int64_t shared_per_multiprocessor;  // bytes of shared memory of a multiprocessor
    int64_t shared_per_block;           // most bytes of shared memory that a block may request
};

// Memory in which a block adds up its bins.
enum class BinsIn : int32_t {
    columns,  // shared memory, with one set of bins per thread, so that no two threads add to the same word
    shared,   // shared memory, with one set of bins for the block
    global,   // global memory, in the sums of the call
};

struct CalibrationLaunch {
    BinsArgs args;  // the arguments of the call, with batch items merged into one if possible
    LabelRange labels;
    BinsIn bins_in = BinsIn::global;
    int classes_held = 0;        // number of classes that a thread holds at once, for voxels_held(classes_held) voxels
    bool transposed = false;     // whether the lanes of a warp read along the classes, and exchange the scores in shared memory
    int64_t bins = 0;            // number of bins of a batch item
    int64_t tiles_per_item = 0;  // a tile has kCudaThreads * voxels_held(classes_held) voxels of one batch item
    int64_t groups = 0;          // a group is all tiles that add to the same sums: those of one item if per_item, else all
    int64_t tiles_per_group = 0;
    int64_t blocks_per_group = 0;
    // Shared memory of a block, in bytes. It holds the totals, then the bins, then the rows of a transposed read.
    int64_t bins_offset = 0, rows_offset = 0, shared_bytes = 0;
    // Positions, in and out [2]: the first voxel whose label is not a class, and the first whose scores are no
    // probabilities.
    int64_t* faults = nullptr;

    int64_t blocks() const { return groups * blocks_per_group; }
};

// Returns the number of voxels that a thread holds at once. It then has 16 scores in flight from memory.
constexpr int voxels_held(int classes_held) { return classes_held >= 16 ? 1 : 4; }

// Plans the tiles and the shared memory of a block. An empty call has no tiles.
CalibrationLaunch calibration_launch(const BinsArgs& args, const CudaLimits& limits);

// Plans the number of blocks, if `resident` blocks fit a multiprocessor at once. As a rule all blocks run at the same time.
// A large call has more blocks, because a thread may take no more than kMostVoxels voxels.
void set_blocks(CalibrationLaunch& launch, const CudaLimits& limits, int64_t resident);

// Launches calibration_bins. It adds to args.sums and args.totals, and lowers the two positions in `faults`, which
// CalibrationLaunch describes. All three are memory of the device. Returns once the kernel is queued on the stream. Throws
// std::runtime_error with the message of CUDA.
void cuda_calibration_bins(const BinsArgs& args, int64_t* faults, int device, void* stream);

// ---- cross_entropy ----

constexpr int kCopyBytes = 16;  // bytes that a thread reads, copies and writes at once

// Of rows:
constexpr int kRowVoxels = 128;                  // voxels of a block: each thread has one
constexpr int64_t kMostRowBytes = 64 * 1024;     // most bytes of a tile
constexpr int64_t kMostSharedBytes = 72 * 1024;  // of a block, with class weights: every GPU from compute capability 8.0 on has them
constexpr int64_t kAlwaysShared = 48 * 1024;     // bytes of shared memory that a block may have without asking

// Of few classes:
constexpr int kFewThreads = 128;  // threads of a block: each has kCopyBytes of every class
constexpr int kFewLeast = 2, kFewMost = 4;
template <int C>
constexpr int kFewGroups = 6 - C;  // times kCopyBytes of every class that a thread has, where only sums are wanted
template <int C>
constexpr int kFewSlots = kCudaWarp * C * (C % 2 ? 8 : 9) / 8;  // vectors of kCopyBytes that a warp has room for, of rows

// Of tiles, for an overlap of more classes:
constexpr int kTileThreads = 128;               // threads of a block
constexpr int kTileVoxels = 1024;               // voxels of a block
constexpr int kPartVoxels = 256;                // voxels of a part: each lane of a warp has kCopyBytes of a class, of 16 bits a number
constexpr int kTileLeast = 5, kTileMost = 128;  // classes

// Numbers that make a division of a number below 2^31 a multiplication: number * multiplier >> 31 >> shift.
struct QuickDivisor {
    uint32_t multiplier = 0;
    int shift = 0;
};
QuickDivisor quick_divisor(uint32_t divisor);

// What a launch computes.
enum class Pass : int32_t {
    loss,              // the losses, and their gradient
    overlap,           // the losses, and the sums of the overlap
    overlap_gradient,  // the gradient of losses and overlap
};

// Cross-entropy with one-hot labels. Either the classes of a voxel are adjacent: each voxel is a row, and the next row
// follows. Or the voxels of a class are adjacent.
struct CrossEntropyLaunch {
    LossArgs args;  // the arguments of the call, with batch items merged into one if possible, unless there is an overlap
    Pass pass = Pass::loss;
    LabelRange labels;
    // Numbers of the device. The factor multiplies loss and gradient, the divisor divides the gradient.
    const float *factor = nullptr, *divisor = nullptr;  // each may be absent
    float* partials = nullptr;                          // out, may be absent: [blocks] sums of the losses, without factor and divisor
    float* counts = nullptr;                            // out, may be absent: [blocks] numbers of voxels that are not ignored
    float* overlap = nullptr;                           // out, of that pass: [blocks][C][kOverlapSums]
    bool few = false;                                   // whether the kernel is that of few classes, else that of rows
    bool in_rows = false;                               // whether the classes of a voxel are adjacent
    bool plain = false;  // no class weights, no label smoothing, and no tensor with a number for each voxel but the labels
    int vector = 1;      // classes that a thread reads at once, 1, 2, 4 or 8. Of few classes: its number of voxels
    float scale = 1.0f;  // of the loss, a part of the factor
    int parts = 1;       // of tiles: parts that shared memory holds at once, 1, 2 or 4
    int tile = 0;        // voxels of a block
    int last_tile = 0;   // voxels of the last block of an item
    unsigned tiles_per_item = 0;
    QuickDivisor per_item;  // of the number of a block, by tiles_per_item
    // Shared memory of a block, in bytes. It holds the sums of the warps or the slopes of the overlap, then the rows if there
    // are any, then the class weights.
    int rows_offset = 0, weights_offset = 0, shared_bytes = 0;
    // Of tiles: it holds the sums of the warps, the logits from rows_offset on, numbers of each voxel, and the sums or the slopes of
    // the overlap.
    int voxels_offset = 0, sums_offset = 0;
    // If `vector` is 8: a row has a number of parts of kCopyBytes, and `row_gap` parts are left free after it.
    QuickDivisor per_row;  // by that number
    int row_gap = 0;

    int64_t blocks() const { return args.shape.N * tiles_per_item; }
};

// Plans the launch. It takes the kernel of few classes if that can do it. Throws std::invalid_argument if no kernel can.
CrossEntropyLaunch cross_entropy_launch(const LossArgs& args, Pass pass);

// Launch one of the kernels, with as many blocks as there are partials. They return once it is queued on the stream. They
// throw std::runtime_error with the message of CUDA.
void cuda_cross_entropy_few(const CrossEntropyLaunch& launch, int device, void* stream);
void cuda_cross_entropy_rows(const CrossEntropyLaunch& launch, int device, void* stream);
void cuda_overlap_few(const CrossEntropyLaunch& launch, int device, void* stream);
void cuda_overlap_tiles(const CrossEntropyLaunch& launch, int device, void* stream);

// Launches the one that the plan takes.
inline void cuda_cross_entropy(const CrossEntropyLaunch& launch, int device, void* stream) {
    const bool is_loss = launch.pass == Pass::loss;
    const auto of_few = is_loss ? cuda_cross_entropy_few : cuda_overlap_few,
               of_more = is_loss ? cuda_cross_entropy_rows : cuda_overlap_tiles;
    (launch.few ? of_few : of_more)(launch, device, stream);
}

}  // namespace calseg
