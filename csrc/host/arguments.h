// The arguments of the kernels, and the table of the kernels that an instruction set's build of csrc/cpu/ provides.
// Plain data only: this header is compiled under every instruction set.
#pragma once

#include "host/tensor_view.h"
#include "specs.h"

namespace calseg {

// The gradient that comes in: for every voxel where grad_output is given; times a factor.
struct Upstream {
    Voxels grad_output;
    double scale = 1.0, kl_scale = 1.0;
};

struct LossSums {
    double loss = 0.0, kl = 0.0;
    int64_t uncounted = 0;  // voxels whose label is ignored, or no class
};

struct LossArgs {
    Shape shape;
    LossSpec spec;
    LossTensors tensors;
    LossTensors gradients;  // out, each optional
    Upstream upstream;
    Voxels loss;                     // out, optional
    LossSums* chunk_sums = nullptr;  // out: [chunks]
};

struct SampleArgs {
    Shape shape;
    SampleSpec spec;
    GaussianTensors tensors;
    Scores soft_labels;         // forward, out
    Scores grad_output;         // backward, in
    GaussianTensors gradients;  // backward, out, each optional
};

struct AccumulateArgs {
    Shape shape;
    AccumulateSpec spec;
    Scores logits;
    Scores total;                     // forward, in and out: += softmax(logits / temperature)
    Scores grad_output, grad_logits;  // backward: in, out
};

struct BlendArgs {
    Shape shape;
    BlendSpec spec;
    Scores estimate;  // in and out
};

// What makes a call of calibration_bins an error: the first label that is no class, the first scores that are no
// probabilities.
struct BinsFault {
    int64_t label_position = -1, label = 0;
    int64_t score_position = -1;
    double total = 0.0, least = 0.0;
};

// NLL in whole nats, its rest, Brier, voxels that count, those with NaN, those with infinite NLL
constexpr int kBinsTotals = 6;

struct BinsArgs {
    Shape shape;
    BinsSpec spec;
    Scores scores;                      // logits or probabilities
    int64_t* sums = nullptr;            // in and out: [items][kinds][n_bins][3]
    int64_t* totals = nullptr;          // in and out: [items][kBinsTotals]
    BinsFault* chunk_faults = nullptr;  // out: [chunks]

    // Number of sets of bins: one for the top label, else one per class.
    int64_t kinds() const { return spec.class_wise ? shape.C - spec.first_class : 1; }
};

// Count, hits, and the sums of f, f^2 and f where hit, each as whole 2^-20 and a rest in units of 2^-50
constexpr int kAceSums = 8;
constexpr int kAceSlopes = 3;

struct AceArgs {
    Shape shape;
    AceSpec spec;
    Scores logits;
    int64_t* sums = nullptr;       // forward, in and out: [N][classes from first_class on][cells][kAceSums]
    int64_t* nans = nullptr;       // forward, in and out: [N], above 0 where a logit is NaN
    const void* slopes = nullptr;  // backward: [N][classes from first_class on][kAceSlopes][cells] of the compute type
    Scores grad_logits;            // backward, out
};

// A pass over labels alone.
struct LabelSums {
    int64_t counted = 0;
    double weight = 0.0;
    int64_t bad_position = -1, bad_value = 0;  // the first label that is neither a class nor ignored
};

struct ScanArgs {
    Shape shape;
    Labels labels;
    const double* weight = nullptr;   // [C]
    LabelSums* chunk_sums = nullptr;  // out: [chunks]
};

// One kernel: how a call divides into chunks (fixed by the shape alone, so that no sum depends on the number of
// threads), the scratch memory that one thread needs, and the work of a chunk.
template <class Args>
struct Kernel {
    int64_t (*num_chunks)(const Args&);
    int64_t (*scratch_bytes)(const Args&);
    void (*run_chunk)(const Args&, int64_t chunk, void* scratch);
};

// The losses by their names. They share their arguments, and what is done around their kernels.
#define CALSEG_LOSSES(LOSS) LOSS(cross_entropy) LOSS(vls_cross_entropy) LOSS(vls_elbo) LOSS(gaussian_kl)

// Every kernel: the type of its arguments and its name.
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

namespace baseline {
extern const KernelTable kernels;
}
namespace avx2 {
extern const KernelTable kernels;
}
namespace avx512 {
extern const KernelTable kernels;
}

}  // namespace calseg
