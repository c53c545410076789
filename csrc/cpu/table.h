// Kernels of one instruction set. Every operation has a source file; table.cpp gathers them.
#pragma once

#include "host/arguments.h"

// The list of operations. EACH(name, Args) stands for one of them.
#define CALSEG_OPERATIONS(EACH)                       \
    EACH(cross_entropy, CrossEntropyArgs)             \
    EACH(vls_cross_entropy, VLSCrossEntropyArgs)      \
    EACH(vls_elbo, VLSElboArgs)                       \
    EACH(sample_soft_labels, SoftLabelsArgs)          \
    EACH(sample_soft_labels_backward, SoftLabelsArgs) \
    EACH(accumulate_softmax, AccumulateArgs)          \
    EACH(accumulate_softmax_backward, AccumulateArgs) \
    EACH(blend_soft_labels, BlendArgs)                \
    EACH(gaussian_kl, GaussianKLArgs)                 \
    EACH(scan_labels, ScanLabelsArgs)                 \
    EACH(calibration_bins, CalibrationArgs)           \
    EACH(ace_moments, AceArgs)                        \
    EACH(ace_moments_backward, AceArgs)

namespace calseg {
namespace CALSEG_ISA {

#define CALSEG_DECLARE(name, Args) extern const Kernel<Args> name;
CALSEG_OPERATIONS(CALSEG_DECLARE)
#undef CALSEG_DECLARE

}  // namespace CALSEG_ISA
}  // namespace calseg
