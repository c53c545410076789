// The operations as the host calls them: labels are checked, and one kernel runs over all chunks.
#pragma once

#include "host/arguments.h"

namespace calseg {

enum class Reduction : int32_t { none, mean, sum };

// The first label out of range, if any. Results are to be thrown away then; inputs are as they were.
struct Outcome {
    double loss = 0.0;  // of mean and sum
    int64_t bad_position = -1, bad_value = 0;
};

Outcome cross_entropy(const CrossEntropyArgs& args, Reduction reduction, int num_threads);
Outcome vls_cross_entropy(const VLSCrossEntropyArgs& args, Reduction reduction, int num_threads);
Outcome vls_elbo(const VLSElboArgs& args, Reduction reduction, int num_threads);
Outcome gaussian_kl(const GaussianKLArgs& args, Reduction reduction, int num_threads);
Outcome sample_soft_labels(const SoftLabelsArgs& args, int num_threads);
Outcome sample_soft_labels_backward(const SoftLabelsArgs& args, int num_threads);
Outcome blend_soft_labels(const BlendArgs& args, int num_threads);
void accumulate_softmax(const AccumulateArgs& args, int num_threads);
void accumulate_softmax_backward(const AccumulateArgs& args, int num_threads);
// The first faults, if any: args.sums and args.totals are to be thrown away then.
CalibrationFault calibration_bins(CalibrationArgs args, int num_threads);
Outcome ace_moments(const AceArgs& args, int num_threads);
void ace_moments_backward(const AceArgs& args, int num_threads);

}  // namespace calseg
