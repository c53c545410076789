// The operations on the host: labels are checked, and one kernel runs over all chunks.
#pragma once

#include "host/arguments.h"

namespace calseg {

// Below this number of elements per thread, waking threads costs more than they save.
constexpr int64_t kElementsPerThread = 1 << 14;

// The first label that is neither a class nor ignored, if any. Results are to be thrown away then; inputs are as they were.
struct LabelFault {
    int64_t position = -1, label = 0;
};

// A loss with its kernel.
LabelFault loss(const Kernel<LossArgs>& kernel, const LossArgs& args, int num_threads);

LabelFault sample_soft_labels(SampleArgs& args, int num_threads);
void sample_soft_labels_backward(SampleArgs& args, int num_threads);
void accumulate_softmax(AccumulateArgs& args, int num_threads);
void accumulate_softmax_backward(AccumulateArgs& args, int num_threads);
LabelFault blend_soft_labels(BlendArgs& args, int num_threads);
// The first faults, if any: args.sums and args.totals are to be thrown away then.
BinsFault calibration_bins(BinsArgs& args, int num_threads);
LabelFault ace_moments(AceArgs& args, int num_threads);
void ace_moments_backward(AceArgs& args, int num_threads);

}  // namespace calseg
