// This instruction set's kernels.
#include "cpu/operations.h"

namespace calseg {
namespace CALSEG_ISA {

const KernelTable kernels = {
    cross_entropy,
    vls_cross_entropy,
    vls_elbo,
    sample_soft_labels,
    sample_soft_labels_backward,
    accumulate_softmax,
    accumulate_softmax_backward,
    blend_soft_labels,
    gaussian_kl,
    scan_labels,
    calibration_bins,
    ace_moments,
    ace_moments_backward,
};

}  // namespace CALSEG_ISA
}  // namespace calseg
