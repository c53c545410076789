#include "cuda/plan.h"

#include <algorithm>
#include <stdexcept>

#include "host/geometry.h"

namespace calseg {
namespace {

constexpr int64_t kReservedBytes = 1024;  // bytes of shared memory that CUDA reserves in each block
constexpr int64_t kTotalsBytes = kCudaWarps * kBinsTotals * 8;

// Merges batch items into one where the sums allow it.
BinsArgs merged(BinsArgs args) {
    TensorView* const views[] = {&args.scores, &args.spec.labels.tensor, &args.spec.mask};
    if (!args.spec.per_item && args.shape.N > 1) merge_items(args.shape, views, 3);
    return args;
}

int bytes_of(DType dtype) {
    switch (dtype) {
        case DType::i16:
        case DType::u16:
            return 2;
        case DType::i32:
        case DType::u32:
            return 4;
        case DType::i64:
        case DType::u64:
            return 8;
        default:
            return 1;
    }
}

LabelRange label_range(const Labels& labels, int64_t C) {
    const DType dtype = labels.tensor.dtype;
    const bool is_signed = dtype == DType::i8 || dtype == DType::i16 || dtype == DType::i32 || dtype == DType::i64;
    const int bytes = bytes_of(dtype);
    const uint64_t all = UINT64_MAX >> (64 - 8 * bytes), highest = is_signed ? all / 2 : all;
    const int64_t ignored = labels.ignore_index;
    LabelRange r;
    r.bytes = bytes;
    r.classes = static_cast<uint64_t>(C) <= highest ? static_cast<uint64_t>(C) : highest + 1;
    r.ignored = static_cast<uint64_t>(ignored) & all;
    r.ignores = ignored >= 0 ? static_cast<uint64_t>(ignored) <= highest : is_signed && static_cast<uint64_t>(-(ignored + 1)) <= highest;
    return r;
}

// Throws unless the voxels of each item are rows that follow one another, from a multiple of 16 bytes on.
void check_rows(const TensorView& rows, DType dtype, const Shape& shape, int itemsize) {
    const bool known = dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16;
    const bool dense = rows.stride_c == 1 && (rows.stride_s == shape.C || shape.S == 1);
    const bool aligned = reinterpret_cast<uintptr_t>(rows.data) % kCopyBytes == 0 && rows.stride_n * itemsize % kCopyBytes == 0;
    if (!known || !dense || !aligned || rows.dtype != dtype)
        throw std::invalid_argument("cross_entropy on CUDA: wanted dense rows of one dtype that begin at multiples of 16 bytes");
}

}  // namespace

CalibrationLaunch calibration_launch(const BinsArgs& args, const CudaLimits& limits) {
    CalibrationLaunch launch;
    launch.bins = args.kinds() * args.spec.n_bins;
    if (args.shape.C > INT32_MAX || launch.bins > INT32_MAX) throw std::runtime_error("calibration_bins on CUDA: wanted below 2^31 bins");
    launch.args = merged(args);
    const Shape& shape = launch.args.shape;
    launch.labels = label_range(args.spec.labels, shape.C);
    launch.classes_held = shape.C <= 4 ? 4 : 16;
    launch.transposed = shape.C > 1 && launch.args.scores.stride_c < launch.args.scores.stride_s;

    const int64_t tile = int64_t{kCudaThreads} * voxels_held(launch.classes_held);
    launch.tiles_per_item = (shape.S + tile - 1) / tile;
    launch.groups = args.spec.per_item ? shape.N : 1;
    launch.tiles_per_group = launch.tiles_per_item * (args.spec.per_item ? 1 : shape.N);

    launch.bins_offset = kTotalsBytes;
    const int64_t rows = launch.transposed ? int64_t{kCudaThreads} * (launch.classes_held + 1) * 4 : 0;
    const int64_t fixed = kTotalsBytes + rows, columns = launch.bins * kCudaThreads * 8, shared = launch.bins * 16;
    int64_t bytes = 0;
    // Use columns only if kCudaResident blocks still fit a multiprocessor. With fewer blocks, too few reads would be in
    // flight.
    if (fixed + columns <= std::min(limits.shared_per_block, limits.shared_per_multiprocessor / kCudaResident - kReservedBytes)) {
        launch.bins_in = BinsIn::columns;
        bytes = columns;
    } else if (fixed + shared <= limits.shared_per_block) {
        launch.bins_in = BinsIn::shared;
        bytes = shared;
    }
    launch.rows_offset = kTotalsBytes + bytes;
    launch.shared_bytes = fixed + bytes;
    return launch;
}

void set_blocks(CalibrationLaunch& launch, const CudaLimits& limits, int64_t resident) {
    if (launch.groups == 0 || launch.tiles_per_group == 0) return;
    const int64_t most_tiles = kMostVoxels / voxels_held(launch.classes_held);  // most tiles of a block
    const int64_t wave = (limits.multiprocessors * resident + launch.groups - 1) / launch.groups;
    const int64_t fewest = (launch.tiles_per_group + most_tiles - 1) / most_tiles;
    launch.blocks_per_group = std::min(std::max(wave, fewest), launch.tiles_per_group);
}

CrossEntropyLaunch cross_entropy_launch(const LossArgs& args) {
    CrossEntropyLaunch launch;
    launch.args = args;
    LossArgs& a = launch.args;
    TensorView* const views[] = {&a.tensors.logits, &a.gradients.logits, &a.spec.labels.tensor, &a.upstream.grad_output, &a.loss};
    merge_items(a.shape, views, 5);
    const int itemsize = a.tensors.logits.dtype == DType::f32 ? 4 : 2;
    for (const Scores* rows : {&a.tensors.logits, &a.gradients.logits})
        if (*rows) check_rows(*rows, a.tensors.logits.dtype, a.shape, itemsize);
    const int64_t C = a.shape.C, row_bytes = C * kRowVoxels * itemsize;
    if (row_bytes > kMostRowBytes) throw std::invalid_argument("cross_entropy on CUDA: wanted fewer classes");
    launch.labels = label_range(a.spec.labels, C);
    launch.plain = !a.spec.weight.data && a.spec.label_smoothing == 0.0 && !a.upstream.grad_output && !a.loss;
    launch.vector = C % 2 ? 1 : C % 4 ? 2 : 4;
    launch.tiles_per_item = static_cast<unsigned>((a.shape.S + kRowVoxels - 1) / kRowVoxels);
    launch.rows_offset = kRowVoxels / kCudaWarp * static_cast<int>(sizeof(float));
    launch.weights_offset = launch.rows_offset + static_cast<int>(row_bytes);
    launch.shared_bytes = launch.weights_offset + (launch.plain ? 0 : static_cast<int>(C * sizeof(float)));
    return launch;
}

}  // namespace calseg
