#include "operations.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace calseg {
namespace {

struct Free {
    void operator()(void* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};

template <class Args>
struct Run {
    const Kernel<Args>& kernel;
    const Args& args;
    char* scratch;
    int64_t scratch_bytes;

    static void chunk(void* self, int64_t index, int thread) {
        const Run& run = *static_cast<Run*>(self);
        run.kernel.run_chunk(run.args, index, run.scratch + thread * run.scratch_bytes);
    }
};

// Below this many elements a thread, waking threads costs more than they save.
constexpr int64_t kElementsPerThread = 1 << 14;

const Shape& shape_of(const VLSCrossEntropyArgs& args) { return args.ce.shape; }
template <class Args>
const Shape& shape_of(const Args& args) {
    return args.shape;
}

template <class Args>
void run(const Kernel<Args>& kernel, const Args& args, int num_threads) {
    const int64_t chunks = kernel.num_chunks(args);
    const int64_t useful = shape_of(args).voxels() * shape_of(args).C / kElementsPerThread + 1;
    if (useful < num_threads) num_threads = static_cast<int>(useful);
    if (chunks < num_threads) num_threads = static_cast<int>(chunks);
    if (chunks == 0) return;
    const int64_t bytes = (kernel.scratch_bytes(args) + 63) / 64 * 64;
    const std::unique_ptr<void, Free> scratch(::operator new[](static_cast<std::size_t>(bytes * num_threads + 64), std::align_val_t{64}));
    Run<Args> work{kernel, args, static_cast<char*>(scratch.get()), bytes};
    parallel_for(chunks, num_threads, &Run<Args>::chunk, &work);
}

LabelSums scan(const Labels& labels, const Shape& shape, const double* weight, int num_threads) {
    LabelSums total;
    if (!labels.view) {
        total.counted = shape.voxels();
        return total;
    }
    ScanLabelsArgs args{shape, labels, labels.is_mask ? nullptr : weight, nullptr};
    const Kernel<ScanLabelsArgs>& kernel = kernels().scan_labels;
    std::vector<LabelSums> sums(static_cast<std::size_t>(kernel.num_chunks(args)));
    args.chunk_sums = sums.data();
    run(kernel, args, num_threads);
    for (const LabelSums& chunk : sums) {
        total.counted += chunk.counted;
        total.weight += chunk.weight;
        if (total.bad_position < 0 && chunk.bad_position >= 0) {
            total.bad_position = chunk.bad_position;
            total.bad_value = chunk.bad_value;
        }
    }
    return total;
}

Outcome bad_label(const LabelSums& sums) { return {0.0, sums.bad_position, sums.bad_value}; }

// The mean's divisors: of the loss, and of the KL term.
struct Divisors {
    double loss = 1.0, kl = 1.0;
};

Divisors divisors(const LabelSums& sums, const Labels& labels, const double* weight, Reduction reduction) {
    if (reduction != Reduction::mean) return {};
    const double voxels = static_cast<double>(sums.counted);
    return {weight && labels.view && !labels.is_mask ? sums.weight : voxels, voxels};
}

// Where a loss keeps what all of them have.
CrossEntropyArgs& common(VLSCrossEntropyArgs& args) { return args.ce; }
template <class Args>
Args& common(Args& args) {
    return args;
}

// The chunks' sums in the order of the chunks: the same for any number of threads.
template <class Args>
LossSums run_loss(const Kernel<Args>& kernel, Args& args, const Divisors& by, int num_threads) {
    common(args).upstream.scale /= by.loss;
    common(args).upstream.kl_scale /= by.kl;
    std::vector<LossSums> chunks(static_cast<std::size_t>(kernel.num_chunks(args)));
    common(args).chunk_sums = chunks.data();
    run(kernel, args, num_threads);
    LossSums total;
    for (const LossSums& chunk : chunks) {
        total.loss += chunk.loss;
        total.kl += chunk.kl;
    }
    return total;
}

template <class Args>
Outcome labelled_loss(const Kernel<Args>& kernel, Args& args, double beta, Reduction reduction, int num_threads) {
    const auto& with = common(args);
    const LabelSums labels = scan(with.labels, with.shape, with.weight, num_threads);
    if (labels.bad_position >= 0) return bad_label(labels);
    const Divisors by = divisors(labels, with.labels, with.weight, reduction);
    const LossSums total = run_loss(kernel, args, by, num_threads);
    return {total.loss / by.loss + (beta != 0.0 ? beta * total.kl / by.kl : 0.0), -1, 0};
}

}  // namespace

Outcome cross_entropy(CrossEntropyArgs args, Reduction reduction, int num_threads) {
    return labelled_loss(kernels().cross_entropy, args, 0.0, reduction, num_threads);
}

Outcome vls_cross_entropy(VLSCrossEntropyArgs args, Reduction reduction, int num_threads) {
    return labelled_loss(kernels().vls_cross_entropy, args, args.gaussian.beta, reduction, num_threads);
}

Outcome vls_elbo(VLSElboArgs args, Reduction reduction, int num_threads) {
    return labelled_loss(kernels().vls_elbo, args, args.gaussian.beta, reduction, num_threads);
}

Outcome gaussian_kl(GaussianKLArgs args, Reduction reduction, int num_threads) {
    const double voxels = reduction == Reduction::mean ? static_cast<double>(args.shape.voxels()) : 1.0;
    return {run_loss(kernels().gaussian_kl, args, {voxels, voxels}, num_threads).kl / voxels, -1, 0};
}

Outcome sample_soft_labels(const SoftLabelsArgs& args, int num_threads) {
    const LabelSums labels = scan(args.labels, args.shape, nullptr, num_threads);
    if (labels.bad_position >= 0) return bad_label(labels);
    run(kernels().sample_soft_labels, args, num_threads);
    return {};
}

Outcome sample_soft_labels_backward(const SoftLabelsArgs& args, int num_threads) {
    run(kernels().sample_soft_labels_backward, args, num_threads);
    return {};
}

Outcome blend_soft_labels(const BlendArgs& args, int num_threads) {
    const LabelSums labels = scan(args.labels, args.shape, nullptr, num_threads);
    if (labels.bad_position >= 0) return bad_label(labels);
    run(kernels().blend_soft_labels, args, num_threads);
    return {};
}

void accumulate_softmax(const AccumulateArgs& args, int num_threads) { run(kernels().accumulate_softmax, args, num_threads); }

void accumulate_softmax_backward(const AccumulateArgs& args, int num_threads) {
    run(kernels().accumulate_softmax_backward, args, num_threads);
}

CalibrationFault calibration_bins(CalibrationArgs args, int num_threads) {
    const auto& kernel = kernels().calibration_bins;
    std::vector<CalibrationFault> faults(static_cast<std::size_t>(kernel.num_chunks(args)));
    args.chunk_faults = faults.data();
    run(kernel, args, num_threads);
    for (const CalibrationFault& fault : faults)  // labels come first: scores are looked at with good labels only
        if (fault.label_position >= 0) return fault;
    for (const CalibrationFault& fault : faults)
        if (fault.score_position >= 0) return fault;
    return {};
}

Outcome ace_moments(const AceArgs& args, int num_threads) {
    const LabelSums labels = scan(args.labels, args.shape, nullptr, num_threads);
    if (labels.bad_position >= 0) return bad_label(labels);
    run(kernels().ace_moments, args, num_threads);
    return {};
}

void ace_moments_backward(const AceArgs& args, int num_threads) { run(kernels().ace_moments_backward, args, num_threads); }

}  // namespace calseg
