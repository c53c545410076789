// CUDA kernels of Dice and cross_entropy with one-hot labels, for logits of few classes: either the voxels of a class are
// adjacent, or the classes of a voxel.
//
// The gradient of Dice needs sums over all voxels first. So there are two passes. The first computes the losses and the sums
// of the overlap, which are described in kernels/overlap.py, and the second the gradient, given that of the sums. There are
// no class weights and no label smoothing.
//
// Least memory traffic: in each pass one read of the logits and of the labels, and in the second one write of the gradient.
//
// The first pass reads 5 to 17 bytes a voxel, which takes a GPU as long as 35 to 120 instructions. So a thread has several
// groups of voxels, and adds them up before it hands anything to other threads.
#include "cuda/few_classes.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Least number of blocks whose registers must fit a multiprocessor at once.
constexpr int overlap_blocks(int C) { return C == 4 ? 8 : 7; }
constexpr int gradient_blocks(int C) { return C == 2 ? 12 : 8; }

// ---- the sums of the overlap ----

// Sums over the voxels of a thread. The label of a voxel is 1 in one class, where |p - Y| is 1 - p, and else 0.
template <int C>
struct FewOverlap {
    float wrong[C] = {}, missed[C] = {};  // of p where the class is not the label, and of 1 - p where it is

    CALSEG_MEMBER void add(const FewSoftmax<C>& softmax, const bool (&is_label)[C]) {
        const float per_sum = reciprocal(softmax.sum);
        float label_e[1] = {softmax.label_d};  // again, which takes less time than to select it
        exp_nonpositive(label_e);
        const float miss = 1.0f - label_e[0] * per_sum;
#pragma unroll
        for (int c = 0; c < C; ++c) {
            if (!is_label[c]) wrong[c] += softmax.e[c] * per_sum;
            else if (C > 2) missed[c] += miss;
        }
    }

    // Computes the sums of p + Y and of |p - Y|, given the numbers of voxels whose label is a class.
    CALSEG_MEMBER void finish(const int (&n)[C], float (&both)[C], float (&apart)[C]) const {
#pragma unroll
        for (int c = 0; c < C; ++c) {
            const float miss = C == 2 ? wrong[1 - c] : missed[c];  // of two classes, what one misses is wrong in the other
            both[c] = wrong[c] + (static_cast<float>(2 * n[c]) - miss);
            apart[c] = wrong[c] + miss;
        }
    }
};

// Adds up over the threads of a block, and stores, the sums of the overlap, those of the losses, and how many voxels are not
// ignored. `n` is how many voxels of the thread each class has.
template <int C>
CALSEG_INLINE void store_sums(const CrossEntropyLaunch& launch, const FewOverlap<C>& overlap, const int (&n)[C], float loss,
                              unsigned count) {
    // Numbers 0 to kOverlap - 1 lie as in memory. The sums of |p - Y| are the same in both of two classes, and there is one.
    constexpr int kOverlap = C == 2 ? 3 : kOverlapSums * C, kAtOnce = C == 2 ? 4 : 8, kLoss = kOverlap, kCount = C == 4 ? 9 : kAtOnce;
    using Row = Adjacent<float, kFewThreads / kCudaWarp>;  // a number of every warp
    Row* const rows = reinterpret_cast<Row*>(shared_memory());
    float both[C], apart[C], numbers[kAtOnce] = {};
    overlap.finish(n, both, apart);
#pragma unroll
    for (int i = 0; i < kOverlap; ++i) numbers[i] = i % 2 ? apart[i / 2] : both[i / 2];
    if constexpr (kLoss < kAtOnce) numbers[kLoss] = loss;
    const float sum = sum_over_lanes(numbers);
    constexpr int kLanes = kCudaWarp / kAtOnce;  // that have the same sum
    if (lane() % kLanes == 0) rows[lane() / kLanes].words[warp()] = sum;
    if constexpr (kLoss >= kAtOnce) {
        float last[1] = {loss};
        const float losses = sum_over_lanes(last);
        if (lane() == 0) rows[kLoss].words[warp()] = losses;
    }
    const unsigned counted = __reduce_add_sync(kAllLanes, count);
    if (lane() == 0) rows[kCount].words[warp()] = static_cast<float>(counted);
    __syncthreads();
    const int i = static_cast<int>(threadIdx.x);
    if (i > kCount) return;
    const Row row = rows[i];
    float of_block = row.words[0];
#pragma unroll
    for (int w = 1; w < kFewThreads / kCudaWarp; ++w) of_block += row.words[w];
    float* const to = launch.overlap + static_cast<int64_t>(blockIdx.x) * (kOverlapSums * C);
    if (i < kOverlap) to[i] = of_block;
    if (C == 2 && i == 1) to[3] = of_block;
    if (i == kLoss) launch.partials[blockIdx.x] = of_block;
    if (i == kCount && launch.counts) launch.counts[blockIdx.x] = of_block;
}

// From is the type in which the logits are stored.
template <class From, int C, bool kRows>
__global__ void __launch_bounds__(kFewThreads, overlap_blocks(C)) overlap_few(const CrossEntropyLaunch launch) {
    using Voxels = FewVoxels<From, C, kRows>;
    constexpr int V = Voxels::V, kGroups = kFewGroups<C>;
    const LossArgs& a = launch.args;
    const BlockTile tile(launch);
    const Groups<V, kGroups> groups(tile);
    Voxels voxels[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) voxels[g].load(a.tensors.logits, tile.n, groups[g]);
    const AdjacentLabels<V, C, kGroups> labels(a.spec.labels.tensor, launch.labels, tile.n, groups);
    FewLosses losses;
    FewOverlap<C> overlap;
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
        voxels[g].for_voxels(labels, g, [&](float (&x)[C], const bool (&is_label)[C]) {
            const FewSoftmax<C> softmax(x, is_label);
            losses.add(softmax);
            overlap.add(softmax, is_label);
        });
    int n[C];
    labels.count(n);
    unsigned count = V * kGroups;
    if (labels.skipped) count -= static_cast<unsigned>(__popc(labels.skipped));
    store_sums<C>(launch, overlap, n, losses.loss(), count);
}

template <class From, int C, bool kRows>
struct OverlapFew {
    static constexpr FewKernel kernel = overlap_few<From, C, kRows>;
};

// ---- the gradient of losses and overlap ----

// Slopes of a class: the gradient with respect to p where p is above Y, and where it is below.
struct Slopes {
    float above, below;
};

// From is the type in which the logits are stored.
template <class From, int C, bool kRows>
__global__ void __launch_bounds__(kFewThreads, gradient_blocks(C)) overlap_gradient_few(const CrossEntropyLaunch launch) {
    using Voxels = FewVoxels<From, C, kRows>;
    constexpr int V = Voxels::V;
    const LossArgs& a = launch.args;
    const BlockTile tile(launch);
    const Groups<V, 1> groups(tile);  // a thread past the end stores nothing
    Voxels voxels;
    voxels.load(a.tensors.logits, tile.n, groups[0]);
    double of_sum = 0.0, of_difference = 0.0;
    if (threadIdx.x < C) {
        const double* const given = a.overlap_slopes + (static_cast<int64_t>(tile.n) * C + threadIdx.x) * kOverlapSums;
        of_sum = given[0], of_difference = given[1];
    }
    const AdjacentLabels<V, C> labels(a.spec.labels.tensor, launch.labels, tile.n, groups);
    Slopes* const shared = reinterpret_cast<Slopes*>(shared_memory());
    if (threadIdx.x < C) shared[threadIdx.x] = {static_cast<float>(of_sum + of_difference), static_cast<float>(of_sum - of_difference)};
    __syncthreads();
    Slopes slopes[C];
#pragma unroll
    for (int c = 0; c < C; ++c) slopes[c] = shared[c];
    const float upstream = Factors(launch).upstream;
    voxels.for_voxels(labels, 0, [&](float (&x)[C], const bool (&is_label)[C]) {
        const FewSoftmax<C> softmax(x, is_label);
        const float per_sum = reciprocal(softmax.sum);
        float p[C], slope[C], shift = upstream;
#pragma unroll
        for (int c = 0; c < C; ++c) {
            p[c] = softmax.e[c] * per_sum;
            slope[c] = is_label[c] ? slopes[c].below : slopes[c].above;
            shift -= slope[c] * p[c];
        }
        // One factor for both gradients, which may cancel each other.
#pragma unroll
        for (int c = 0; c < C; ++c) x[c] = p[c] * (slope[c] + shift) - (is_label[c] ? upstream : 0.0f);
    });
    voxels.store(a.gradients.logits, tile.n, groups, shared_memory() + launch.rows_offset);
}

template <class From, int C, bool kRows>
struct OverlapGradientFew {
    static constexpr FewKernel kernel = overlap_gradient_few<From, C, kRows>;
};

}  // namespace
}  // namespace CALSEG_ISA

void cuda_overlap_few(const CrossEntropyLaunch& launch, int device, void* stream) {
    using namespace CALSEG_ISA;
    (launch.pass == Pass::overlap ? launch_few<OverlapFew> : launch_few<OverlapGradientFew>)(launch, device, stream);
}

}  // namespace calseg
