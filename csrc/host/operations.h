// Operations of the CPU engine. Each one checks the labels and computes all chunks of a kernel on several threads.
#pragma once

#include "host/arguments.h"

namespace calseg {

// Result of an operation that checks labels. If bad_position is not -1, it is the position in [N, S] of the first label
// that is neither a class nor ignored, and bad_value is that label. The results of the operation are then invalid. Its
// inputs have not been changed.
struct Outcome {
    double loss = 0.0;  // the reduced loss, for the reductions mean and sum
    int64_t bad_position = -1, bad_value = 0;
};

// Computes the loss that `kernel` belongs to, and its gradients.
Outcome loss(const Kernel<LossArgs>& kernel, const LossArgs& args, int num_threads);

Outcome sample_soft_labels(const SampleArgs& args, int num_threads);
void sample_soft_labels_backward(const SampleArgs& args, int num_threads);
void accumulate_softmax(const AccumulateArgs& args, int num_threads);
void accumulate_softmax_backward(const AccumulateArgs& args, int num_threads);
Outcome blend_soft_labels(const BlendArgs& args, int num_threads);
// Returns the first fault, if there is one. args.sums and args.totals are then invalid.
BinsFault calibration_bins(BinsArgs args, int num_threads);
Outcome ace_moments(const AceArgs& args, int num_threads);
void ace_moments_backward(const AceArgs& args, int num_threads);

}  // namespace calseg
