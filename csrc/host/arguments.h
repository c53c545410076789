// Arguments of the CPU kernels, and the table of all kernels. Each instruction set has two tables of its own.
//
// The structures hold plain data only, because this header is compiled once per instruction set. Fields marked "out" are
// written by the kernel. A tensor without data is absent.
#pragma once

#include "host/tensor_view.h"
#include "specs.h"

namespace calseg {

// Upstream gradient of a loss: scale for the loss of every voxel, and kl_scale for its KL term. If grad_output is given,
// both are multiplied by its number for that voxel.
struct Upstream {
    Voxels grad_output;
    double scale = 1.0, kl_scale = 1.0;
};

// Sums over voxels that a loss kernel computes.
struct LossSums {
    double loss = 0.0, kl = 0.0;
    int64_t uncounted = 0;  // number of voxels whose label is ignored or not a class
};

// Overlap of the probabilities p with the labels Y. For each item and class it has two sums over the voxels that count:
// of p + Y, and of |p - Y|. The overlap is no part of the loss. The caller computes Dice from the sums.
constexpr int kOverlapSums = 2;

struct LossArgs {
    Shape shape;
    LossSpec spec;
    LossTensors tensors;
    // Out, each may be absent. If overlap_sums are computed of sampled labels, the labels are stored in place of the gradient
    // of the logits.
    LossTensors gradients;
    Upstream upstream;
    Voxels loss;                             // out, may be absent: loss of every voxel
    void* reduced = nullptr;                 // out, may be absent: mean or sum, in the type in which the scores are computed
    double* divisor = nullptr;               // out, may be absent: divisor of the sum of the losses
    double* overlap_sums = nullptr;          // out, may be absent: [N][C][kOverlapSums]
    const double* overlap_slopes = nullptr;  // may be absent: gradient of the result with respect to the sums, same shape
    double* chunk_overlap = nullptr;         // out: [chunks][C][kOverlapSums], if there are overlap_sums
    LossSums* chunk_sums = nullptr;          // out: [chunks]
};

struct SampleArgs {
    Shape shape;
    SampleSpec spec;
    GaussianTensors tensors;
    Scores soft_labels;         // forward: out
    Scores grad_output;         // backward: in
    GaussianTensors gradients;  // backward: out, each may be absent
};

struct AccumulateArgs {
    Shape shape;
    AccumulateSpec spec;
    Scores logits;
    Scores total;        // forward: in and out, to which softmax(logits / temperature) is added
    Scores grad_output;  // backward: in
    Scores grad_logits;  // backward: out
};

struct BlendArgs {
    Shape shape;
    BlendSpec spec;
    Scores estimate;  // in and out
};

// Bad input of calibration_bins. A position is that of the first bad voxel in [N, S], or -1 if there is none.
struct BinsFault {
    int64_t label_position = -1;      // voxel whose label is neither a class nor ignored
    int64_t score_position = -1;      // voxel whose scores are no probabilities
    double total = 0.0, least = 0.0;  // sum and smallest of these scores
};

// Number of totals of calibration_bins: sum of the negative log-likelihoods (NLL) in whole nats, rest of that sum in units
// of 2^-24, sum of the Brier scores in units of 2^-24, number of voxels that count, number of those with NaN, and number of
// those with infinite NLL.
constexpr int kBinsTotals = 6;

struct BinsArgs {
    Shape shape;
    BinsSpec spec;
    Scores scores;                      // logits or probabilities
    int64_t* sums = nullptr;            // in and out: [items][kinds][n_bins][count, confidence, hits]
    int64_t* totals = nullptr;          // in and out: [items][kBinsTotals]
    BinsFault* chunk_faults = nullptr;  // out: [chunks]

    // Number of sets of bins: one for the top label, else one per class.
    int64_t kinds() const { return spec.class_wise ? shape.C - spec.first_class : 1; }
};

// Number of sums per cell of ace_moments: count, hits, and the sums of f, of f^2, and of f over the hits. Each of these
// three takes two places: whole multiples of 2^-20, and a rest in units of 2^-50. csrc/cpu/ace_moments.cpp says what cells
// and f are.
constexpr int kAceSums = 8;
// Number of slopes per cell, from which the backward kernel computes the gradient.
constexpr int kAceSlopes = 3;

struct AceArgs {
    Shape shape;
    AceSpec spec;
    Scores logits;
    int64_t* sums = nullptr;       // forward: in and out, [N][classes from first_class on][cells][kAceSums]
    int64_t* nans = nullptr;       // forward: in and out, [N], above 0 if a probability of the item is NaN
    const void* slopes = nullptr;  // backward: in, [N][classes from first_class on][kAceSlopes][cells] of the compute type
    Scores grad_logits;            // backward: out
};

// Result of scan_labels.
struct LabelSums {
    int64_t counted = 0;        // number of voxels that are not ignored
    double weight = 0.0;        // sum of their class weights
    int64_t bad_position = -1;  // position of the first label that is neither a class nor ignored
};

struct ScanArgs {
    Shape shape;
    Labels labels;
    const double* weight = nullptr;   // [C], may be absent
    LabelSums* chunk_sums = nullptr;  // out: [chunks]
};

// Dtype of the scores that a call computes with. float64 is computed in double, every other dtype in float.
inline DType scores_dtype(const LossArgs& args) { return (args.tensors.logits ? args.tensors.logits : args.tensors.mu).dtype; }
inline DType scores_dtype(const SampleArgs& args) { return args.tensors.mu.dtype; }
inline DType scores_dtype(const AccumulateArgs& args) { return args.logits.dtype; }
inline DType scores_dtype(const BlendArgs& args) { return args.estimate.dtype; }
inline DType scores_dtype(const BinsArgs& args) { return args.scores.dtype; }
inline DType scores_dtype(const AceArgs& args) { return args.logits.dtype; }

// Kernel, as three functions. The number of chunks depends on the arguments alone, so that no sum depends on the number of
// threads.
template <class Args>
struct Kernel {
    int64_t (*num_chunks)(const Args&);
    int64_t (*scratch_bytes)(const Args&);                             // scratch memory that a thread needs
    void (*compute_chunk)(const Args&, int64_t chunk, void* scratch);  // computes one chunk
};

// Names of the losses, which all take LossArgs and are called through loss() of host/operations.h.
#define CALSEG_LOSSES(LOSS) LOSS(cross_entropy) LOSS(vls_cross_entropy) LOSS(vls_elbo) LOSS(gaussian_kl)

// Type of the arguments and name of every kernel.
#define CALSEG_LOSS_KERNEL(name) CALSEG_KERNEL(LossArgs, name)
#define CALSEG_KERNELS                                         \
    CALSEG_LOSSES(CALSEG_LOSS_KERNEL)                          \
    CALSEG_KERNEL(SampleArgs, sample_soft_labels)              \
    CALSEG_KERNEL(SampleArgs, sample_soft_labels_backward)     \
    CALSEG_KERNEL(AccumulateArgs, accumulate_softmax)          \
    CALSEG_KERNEL(AccumulateArgs, accumulate_softmax_backward) \
    CALSEG_KERNEL(BlendArgs, blend_soft_labels)                \
    CALSEG_KERNEL(BinsArgs, calibration_bins)                  \
    CALSEG_KERNEL(AceArgs, ace_moments)                        \
    CALSEG_KERNEL(AceArgs, ace_moments_backward)               \
    CALSEG_KERNEL(ScanArgs, scan_labels)

struct KernelTable {
#define CALSEG_KERNEL(Args, name) Kernel<Args> name;
    CALSEG_KERNELS
#undef CALSEG_KERNEL
};

// The kernels of an instruction set: those that compute in float, or those that compute in double.
#define CALSEG_TABLE(isa)             \
    namespace isa {                   \
    extern const KernelTable kernels; \
    }
CALSEG_TABLE(baseline)
CALSEG_TABLE(baseline_double)
CALSEG_TABLE(avx2)
CALSEG_TABLE(avx2_double)
CALSEG_TABLE(avx512)
#undef CALSEG_TABLE

}  // namespace calseg
