// The table of CPU kernels: what an instruction set's build of csrc/cpu/ provides, and the arguments it takes.
// Plain data only: this header is compiled under every instruction set.
#pragma once

#include <cstdint>

namespace calseg {

enum class DType : int32_t { f32, f64, bf16, f16, u8, i8, i16, i32, i64, u16, u32, u64, boolean };

// A tensor seen as [N, C, S]: the spatial axes collapse to one stride. Strides are in elements. Labels: stride_c = 0.
struct TensorView {
    void* data = nullptr;
    DType dtype = DType::f32;
    int64_t stride_n = 0, stride_c = 0, stride_s = 0;
    explicit operator bool() const { return data != nullptr; }
};

struct Shape {
    int64_t N = 0, C = 0, S = 0;
    int64_t voxels() const { return N * S; }
};

// Which voxels count: those whose label is not ignore_index. Without labels, all do.
struct Labels {
    TensorView view;  // [N, S]
    int64_t ignore_index = -100;
    bool is_mask = false;  // labels only tell which voxels are ignored; they are not classes
};

struct Gaussian {
    TensorView mu, logvar;  // [N, C, S]
    double temperature = 1.0, beta = 0.0, prior_mu = 0.0, prior_logvar = 0.0;
    int64_t num_samples = 1;
    uint64_t seed = 0;
};

// The upstream gradient: per voxel where grad_output is given; times scale.
struct Upstream {
    TensorView grad_output;  // [N, S]
    double scale = 1.0, kl_scale = 1.0;
};

struct LossSums {
    double loss = 0.0, kl = 0.0;
    int64_t uncounted = 0;  // voxels whose label is ignored, or no class
};

struct CrossEntropyArgs {
    Shape shape;
    TensorView logits;
    TensorView soft_labels;  // given soft labels; else one-hot labels
    Labels labels;
    const double* weight = nullptr;  // [C]
    double label_smoothing = 0.0;
    Upstream upstream;
    TensorView loss;                           // out, optional: [N, S]
    TensorView grad_logits, grad_soft_labels;  // out, optional
    LossSums* chunk_sums = nullptr;            // out: [chunks]
};

struct VLSCrossEntropyArgs {
    CrossEntropyArgs ce;
    Gaussian gaussian;
    double alpha = 0.1;
    TensorView grad_mu, grad_logvar;  // out, optional
};

struct VLSElboArgs {
    Shape shape;
    Gaussian gaussian;
    Labels labels;
    const double* weight = nullptr;
    Upstream upstream;
    TensorView loss, grad_mu, grad_logvar;
    LossSums* chunk_sums = nullptr;
};

struct SoftLabelsArgs {
    Shape shape;
    Gaussian gaussian;
    Labels labels;  // optional: blended in, with weight 1 - alpha
    double alpha = 1.0;
    TensorView soft_labels;                        // out of forward
    TensorView grad_output, grad_mu, grad_logvar;  // backward: in [N, C, S], out, out
};

struct AccumulateArgs {
    Shape shape;
    TensorView logits;
    double temperature = 1.0;
    TensorView total;                     // forward: += softmax(logits / temperature)
    TensorView grad_output, grad_logits;  // backward: in, out
};

struct BlendArgs {
    Shape shape;
    TensorView estimate, blended;  // in, out [N, C, S]; may be the same memory
    Labels labels;                 // optional
    double alpha = 1.0;
    double scale = 1.0;  // of the estimate
};

struct GaussianKLArgs {
    Shape shape;
    Gaussian gaussian;
    Upstream upstream;
    TensorView loss, grad_mu, grad_logvar;
    LossSums* chunk_sums = nullptr;
};

// What a chunk met that makes the call an error: the first label that is no class, the first scores that are no
// probabilities.
struct CalibrationFault {
    int64_t label_position = -1, label = 0;
    int64_t score_position = -1;
    double total = 0.0, least = 0.0;
};

// NLL in whole nats, its rest, Brier, voxels that count, those with NaN, those with infinite NLL
constexpr int kCalibrationTotals = 6;

struct CalibrationArgs {
    Shape shape;
    TensorView scores;  // logits or probabilities
    Labels labels;
    TensorView mask;  // uint8 [N, S], optional: 0 where a voxel does not count
    int64_t n_bins = 15, first_class = 0;
    bool from_logits = true, class_wise = false, skip_background = false, per_item = false, right_closed = false;
    double tolerance = 0.0;                    // of given probabilities
    int64_t* sums = nullptr;                   // in and out: [items][classes from first_class on, or 1][n_bins][3]
    int64_t* totals = nullptr;                 // in and out: [items][kCalibrationTotals]
    CalibrationFault* chunk_faults = nullptr;  // out: [chunks]
};

// Count, hits, and the sums of f, f^2 and f where hit, each as whole 2^-20 and a rest in units of 2^-50
constexpr int kAceSums = 8;
constexpr int kAceSlopes = 3;

struct AceArgs {
    Shape shape;
    TensorView logits;
    Labels labels;
    int64_t n_bins = 20, first_class = 0;
    bool soft = false;
    int64_t* sums = nullptr;       // forward, in and out: [N][classes from first_class on][cells][kAceSums]
    int64_t* nans = nullptr;       // forward, in and out: [N], above 0 where a logit is NaN
    const void* slopes = nullptr;  // backward: [N][classes from first_class on][kAceSlopes][cells] of the compute type
    TensorView grad_logits;        // backward, out
};

struct LabelSums {
    int64_t counted = 0;
    double weight = 0.0;
    int64_t bad_position = -1, bad_value = 0;  // the first label that is neither a class nor ignored
};

struct ScanLabelsArgs {
    Shape shape;
    Labels labels;
    const double* weight = nullptr;
    LabelSums* chunk_sums = nullptr;
};

// One operation: how a call divides into chunks (fixed by the shape alone, so that no sum depends on the number of
// threads), the scratch memory one thread needs, and the chunk's work.
template <class Args>
struct Kernel {
    int64_t (*num_chunks)(const Args&);
    int64_t (*scratch_bytes)(const Args&);
    void (*run_chunk)(const Args&, int64_t chunk, void* scratch);
};

struct KernelTable {
    Kernel<CrossEntropyArgs> cross_entropy;
    Kernel<VLSCrossEntropyArgs> vls_cross_entropy;
    Kernel<VLSElboArgs> vls_elbo;
    Kernel<SoftLabelsArgs> sample_soft_labels, sample_soft_labels_backward;
    Kernel<AccumulateArgs> accumulate_softmax, accumulate_softmax_backward;
    Kernel<BlendArgs> blend_soft_labels;
    Kernel<GaussianKLArgs> gaussian_kl;
    Kernel<ScanLabelsArgs> scan_labels;
    Kernel<CalibrationArgs> calibration_bins;
    Kernel<AceArgs> ace_moments, ace_moments_backward;
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
