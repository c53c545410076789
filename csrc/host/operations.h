// Operations of the CPU engine. Each one checks the labels and computes all chunks of a kernel on several threads.
#pragma once

#include "host/arguments.h"

namespace calseg {

// Number of elements that a thread should have at least. With fewer, waking the thread takes more time than it saves.
constexpr int64_t kElementsPerThread = 1 << 14;

// First label that is neither a class nor ignored. Its position is that of the voxel in [N, S], or -1 if there is no such
// label. If there is one, the results of the operation are invalid, and its inputs have not been changed.
struct LabelFault {
    int64_t position = -1;
};

// Computes the loss that `kernel` belongs to, and its gradients.
LabelFault loss(const Kernel<LossArgs>& kernel, const LossArgs& args, int num_threads);
// Computes the loss and the sums of the overlap, for hard, given or sampled labels.
LabelFault loss_and_overlap(LossArgs& args, int num_threads);
// Computes the gradients of the loss, a sum over voxels, and of the overlap, for hard or given labels.
LabelFault overlap_backward(LossArgs& args, int num_threads);

LabelFault sample_soft_labels(SampleArgs& args, int num_threads);
void sample_soft_labels_backward(SampleArgs& args, int num_threads);
void accumulate_softmax(AccumulateArgs& args, int num_threads);
void accumulate_softmax_backward(AccumulateArgs& args, int num_threads);
LabelFault blend_soft_labels(BlendArgs& args, int num_threads);
// Returns the first fault, if there is one. args.sums and args.totals are then invalid.
BinsFault calibration_bins(BinsArgs& args, int num_threads);
LabelFault ace_moments(AceArgs& args, int num_threads);
void ace_moments_backward(AceArgs& args, int num_threads);

}  // namespace calseg
