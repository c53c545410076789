// CUDA kernel of cross_entropy with one-hot labels, for logits of few classes: either the voxels of a class are adjacent, or
// the classes of a voxel.
//
// It computes the loss and the gradient in one pass. csrc/voxel/cross_entropy.h has the mathematics, which the CPU kernel
// uses too. There are no class weights, no label smoothing, and no tensor with a number for each voxel but the labels.
//
// Least memory traffic: one read of the logits and of the labels, and one write of the gradient.
//
// A thread has four or eight adjacent voxels: csrc/cuda/few_classes.h. Nothing is left to do for other threads but the sum
// of the losses.
#include "cuda/few_classes.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Least number of blocks whose registers must fit a multiprocessor at once.
constexpr int few_blocks(int C) { return C == 2 ? 10 : 7; }

// From is the type in which the logits are stored.
template <class From, int C, bool kRows>
__global__ void __launch_bounds__(kFewThreads, few_blocks(C)) cross_entropy_few(const CrossEntropyLaunch launch) {
    using Voxels = FewVoxels<From, C, kRows>;
    constexpr int V = Voxels::V;
    const LossArgs& a = launch.args;
    const BlockTile tile(launch);
    const Groups<V, 1> groups(tile);  // a thread past the end has no loss and stores nothing
    Voxels voxels;
    voxels.load(a.tensors.logits, tile.n, groups[0]);
    const AdjacentLabels<V, C> labels(a.spec.labels.tensor, launch.labels, tile.n, groups);
    const float upstream = Factors(launch).upstream;
    FewLosses losses;
    voxels.for_voxels(labels, 0, [&](float (&x)[C], const bool (&is_label)[C]) {
        const FewSoftmax<C> softmax(x, is_label);
        losses.add(softmax);
        const HardSums<float> sums{softmax.sum, softmax.label_d, 0.0f, 0.0f};
        const HardLoss<float> result = hard_loss<true, float>(sums, upstream, Smoothing<float>(0.0, C), 0.0f);
#pragma unroll
        for (int c = 0; c < C; ++c) x[c] = softmax.e[c] * result.scale_e - (is_label[c] ? result.scale_label : 0.0f);
    });
    if (a.gradients.logits.data) voxels.store(a.gradients.logits, tile.n, groups, shared_memory() + launch.rows_offset);
    const float loss = groups.is_past(0) ? 0.0f : losses.loss();
    store_partial<kFewThreads>(launch, loss, reinterpret_cast<float*>(shared_memory()));
}

template <class From, int C, bool kRows>
struct CrossEntropyFew {
    static constexpr FewKernel kernel = cross_entropy_few<From, C, kRows>;
};

}  // namespace
}  // namespace CALSEG_ISA

void cuda_cross_entropy_few(const CrossEntropyLaunch& launch, int device, void* stream) {
    CALSEG_ISA::launch_few<CALSEG_ISA::CrossEntropyFew>(launch, device, stream);
}

}  // namespace calseg
