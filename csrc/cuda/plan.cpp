#include "cuda/plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

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
    r.ignores_class = r.ignores && r.ignored < r.classes;
    return r;
}

// Returns whether a tensor and its items begin at multiples of 16 bytes.
bool is_aligned(const TensorView& tensor, int itemsize) {
    return reinterpret_cast<uintptr_t>(tensor.data) % kCopyBytes == 0 && tensor.stride_n * itemsize % kCopyBytes == 0;
}

// Returns whether the voxels of each item are rows that follow one another, from a multiple of 16 bytes on.
bool is_in_rows(const TensorView& scores, const Shape& shape, int itemsize) {
    return scores.stride_c == 1 && (scores.stride_s == shape.C || shape.S == 1) && is_aligned(scores, itemsize);
}

// Returns whether each class of each item is dense, from a multiple of 16 bytes on.
bool is_in_planes(const TensorView& scores, int itemsize) {
    return scores.stride_s == 1 && scores.stride_c * itemsize % kCopyBytes == 0 && is_aligned(scores, itemsize);
}

// Plans the kernel of few classes.
void plan_few(CrossEntropyLaunch& launch, int itemsize) {
    const int slots[] = {kFewSlots<2>, kFewSlots<3>, kFewSlots<4>}, groups[] = {kFewGroups<2>, kFewGroups<3>, kFewGroups<4>};
    const int64_t of_classes = launch.args.shape.C - kFewLeast;
    launch.vector = kCopyBytes / itemsize;
    launch.tile = kFewThreads * launch.vector * (launch.pass == Pass::overlap ? groups[of_classes] : 1);
    const int sums = launch.pass == Pass::loss ? 1 : launch.pass == Pass::overlap ? kOverlapSums * kFewMost + 2 : kOverlapSums;
    launch.rows_offset = sums * std::max(kCopyBytes, kFewThreads / kCudaWarp * static_cast<int>(sizeof(float)));
    const int of_rows = launch.in_rows && launch.pass != Pass::overlap ? slots[of_classes] * kFewThreads / kCudaWarp : 0;
    launch.shared_bytes = launch.rows_offset + of_rows * kCopyBytes;
}

// Plans the kernels of tiles. A block has so many parts at once that enough bytes are on their way to a multiprocessor.
void plan_tiles(CrossEntropyLaunch& launch, int itemsize) {
    const int C = static_cast<int>(launch.args.shape.C), number = static_cast<int>(sizeof(float));
    const bool has_sums = launch.pass == Pass::overlap;
    launch.tile = kTileVoxels;
    launch.parts = C <= 16 ? 4 : C <= 32 ? 2 : 1;
    const int at_once = launch.parts * kPartVoxels;
    launch.rows_offset = 2 * kTileThreads / kCudaWarp * number;
    launch.voxels_offset = launch.rows_offset + C * at_once * itemsize;
    launch.sums_offset = launch.voxels_offset + at_once * (has_sums ? 2 * number : 1);
    launch.shared_bytes = launch.sums_offset + C * (has_sums ? 4 : kOverlapSums) * number;
}

// Plans the kernel of rows.
void plan_rows(CrossEntropyLaunch& launch, int itemsize) {
    const int64_t C = launch.args.shape.C, row_bytes = C * kRowVoxels * itemsize;
    if (row_bytes > kMostRowBytes) throw std::invalid_argument("cross_entropy on CUDA: wanted fewer classes");
    launch.vector = C % 2 ? 1 : C % 4 ? 2 : C % 8 ? 4 : 8;
    launch.tile = kRowVoxels;
    const auto parts = static_cast<uint32_t>(C * itemsize / kCopyBytes);
    if (launch.vector == 8) launch.per_row = quick_divisor(parts), launch.row_gap = parts % 2 == 0;
    launch.rows_offset = kRowVoxels / kCudaWarp * static_cast<int>(sizeof(float));
    launch.weights_offset = launch.rows_offset + static_cast<int>(row_bytes) + kRowVoxels * launch.row_gap * kCopyBytes;
    launch.shared_bytes = launch.weights_offset + (launch.plain ? 0 : static_cast<int>(C * sizeof(float)));
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

QuickDivisor quick_divisor(uint32_t divisor) {
    QuickDivisor d;
    while (uint64_t{1} << d.shift < divisor) ++d.shift;
    d.multiplier = static_cast<uint32_t>((uint64_t{1} << 31 << d.shift) / divisor + 1);
    return d;
}

CrossEntropyLaunch cross_entropy_launch(const LossArgs& args, Pass pass) {
    CrossEntropyLaunch launch;
    launch.args = args, launch.pass = pass;
    LossArgs& a = launch.args;
    TensorView* const views[] = {&a.tensors.logits, &a.gradients.logits, &a.spec.labels.tensor, &a.upstream.grad_output, &a.loss};
    if (pass == Pass::loss || a.shape.N == 1) merge_items(a.shape, views, 5);
    const DType dtype = a.tensors.logits.dtype;
    if ((dtype != DType::f32 && dtype != DType::bf16 && dtype != DType::f16) || (a.gradients.logits && a.gradients.logits.dtype != dtype))
        throw std::invalid_argument("cross_entropy on CUDA: wanted logits and gradients of one dtype that the kernels have");
    const int itemsize = dtype == DType::f32 ? 4 : 2;
    const int64_t C = a.shape.C;
    launch.labels = label_range(a.spec.labels, C);
    launch.plain = !a.spec.weight.data && a.spec.label_smoothing == 0.0 && !a.upstream.grad_output && !a.loss;
    launch.scale = static_cast<float>(a.spec.scale);
    bool in_planes = true;
    launch.in_rows = true;
    for (const Scores* scores : {&a.tensors.logits, &a.gradients.logits}) {
        if (!*scores) continue;
        launch.in_rows = launch.in_rows && is_in_rows(*scores, a.shape, itemsize);
        in_planes = in_planes && is_in_planes(*scores, itemsize);
    }
    const TensorView& labels = a.spec.labels.tensor;
    const bool in_vectors = a.shape.S % (kCopyBytes / itemsize) == 0 && labels.stride_s == 1 && is_aligned(labels, launch.labels.bytes);
    launch.few = launch.plain && C >= kFewLeast && C <= kFewMost && in_vectors && (launch.in_rows || in_planes);
    const bool has_overlap = pass != Pass::loss;
    const bool in_tiles = launch.plain && C >= kTileLeast && C <= kTileMost && itemsize == 2 && in_planes && in_vectors;
    if (has_overlap && !launch.few && !in_tiles)
        throw std::invalid_argument("cross_entropy on CUDA: wanted few classes, or planes of 16 bits, beside an overlap");
    if (!has_overlap && !launch.few && !launch.in_rows)
        throw std::invalid_argument("cross_entropy on CUDA: wanted dense rows that begin at multiples of 16 bytes, or few classes");
    (launch.few ? plan_few : has_overlap ? plan_tiles : plan_rows)(launch, itemsize);
    launch.tiles_per_item = static_cast<unsigned>((a.shape.S + launch.tile - 1) / launch.tile);
    launch.last_tile = static_cast<int>(a.shape.S - (int64_t{launch.tiles_per_item} - 1) * launch.tile);
    launch.per_item = quick_divisor(std::max(launch.tiles_per_item, 1u));
    return launch;
}

}  // namespace calseg
