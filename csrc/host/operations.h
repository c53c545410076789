// The operations on the host: labels are checked, and one kernel runs over all chunks.
#pragma once

#include "host/arguments.h"

namespace calseg {

// The first label out of range, if any. Results are to be thrown away then; inputs are as they were.
struct Outcome {
    double loss = 0.0;  // of mean and sum
    int64_t bad_position = -1, bad_value = 0;
};

// A loss with its kernel.
Outcome loss(const Kernel<LossArgs>& kernel, const LossArgs& args, int num_threads);

Outcome sample_soft_labels(const SampleArgs& args, int num_threads);
void sample_soft_labels_backward(const SampleArgs& args, int num_threads);
void accumulate_softmax(const AccumulateArgs& args, int num_threads);
void accumulate_softmax_backward(const AccumulateArgs& args, int num_threads);
Outcome blend_soft_labels(const BlendArgs& args, int num_threads);
// The first faults, if any: args.sums and args.totals are to be thrown away then.
BinsFault calibration_bins(BinsArgs args, int num_threads);
Outcome ace_moments(const AceArgs& args, int num_threads);
void ace_moments_backward(const AceArgs& args, int num_threads);

}  // namespace calseg
