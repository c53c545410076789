// The operations of one instruction set, one source file each; table.cpp gathers them.
#pragma once

#include "host/arguments.h"

namespace calseg {
namespace CALSEG_ISA {

extern const Kernel<CrossEntropyArgs> cross_entropy;
extern const Kernel<VLSCrossEntropyArgs> vls_cross_entropy;
extern const Kernel<VLSElboArgs> vls_elbo;
extern const Kernel<SoftLabelsArgs> sample_soft_labels, sample_soft_labels_backward;
extern const Kernel<AccumulateArgs> accumulate_softmax, accumulate_softmax_backward;
extern const Kernel<BlendArgs> blend_soft_labels;
extern const Kernel<GaussianKLArgs> gaussian_kl;
extern const Kernel<ScanLabelsArgs> scan_labels;
extern const Kernel<CalibrationArgs> calibration_bins;
extern const Kernel<AceArgs> ace_moments, ace_moments_backward;

}  // namespace CALSEG_ISA
}  // namespace calseg
