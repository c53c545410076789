#include "host/operations.h"

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "host/dispatch.h"
#include "host/parallel.h"

namespace calseg {
namespace {

struct Free {
    void operator()(void* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};

// stop_after(chunk), asked once a chunk is done: whether the others are wanted no more
template <class Args, class StopAfter>
struct Run {
    const Kernel<Args>& kernel;
    const Args& args;
    const StopAfter& stop_after;
    char* scratch;
    int64_t scratch_bytes;
    std::atomic<bool> stopped{false};

    static void chunk(void* self, int64_t index, int thread) {
        Run& run = *static_cast<Run*>(self);
        if (run.stopped.load(std::memory_order_relaxed)) return;
        run.kernel.run_chunk(run.args, index, run.scratch + thread * run.scratch_bytes);
        if (run.stop_after(index)) run.stopped.store(true, std::memory_order_relaxed);
    }
};

// Below this many elements a thread, waking threads costs more than they save.
constexpr int64_t kElementsPerThread = 1 << 14;

template <class Args, class StopAfter>
void run(const Kernel<Args>& kernel, const Args& args, int num_threads, const StopAfter& stop_after) {
    const int64_t chunks = kernel.num_chunks(args);
    const int64_t useful = args.shape.voxels() * args.shape.C / kElementsPerThread + 1;
    if (useful < num_threads) num_threads = static_cast<int>(useful);
    if (chunks < num_threads) num_threads = static_cast<int>(chunks);
    if (chunks == 0) return;
    const int64_t bytes = (kernel.scratch_bytes(args) + 63) / 64 * 64;
    const std::unique_ptr<void, Free> scratch(::operator new[](static_cast<std::size_t>(bytes * num_threads + 64), std::align_val_t{64}));
    using Work = Run<Args, StopAfter>;
    Work work{kernel, args, stop_after, static_cast<char*>(scratch.get()), bytes};
    parallel_for(chunks, num_threads, &Work::chunk, &work);
}

template <class Args>
void run(const Kernel<Args>& kernel, const Args& args, int num_threads) {
    run(kernel, args, num_threads, [](int64_t) { return false; });
}

LabelSums scan(const Labels& labels, const Shape& shape, const double* weight, int num_threads) {
    LabelSums total;
    if (!labels.tensor) {
        total.counted = shape.voxels();
        return total;
    }
    ScanArgs args{shape, labels, labels.is_mask ? nullptr : weight, nullptr};
    const Kernel<ScanArgs>& kernel = kernels().scan_labels;
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

// Runs a kernel unless a label is out of range.
template <class Args>
Outcome run_with_good_labels(const Kernel<Args>& kernel, const Args& args, int num_threads) {
    const LabelSums labels = scan(args.spec.labels, args.shape, nullptr, num_threads);
    if (labels.bad_position >= 0) return bad_label(labels);
    run(kernel, args, num_threads);
    return {};
}

// The divisors of the mean: of the loss, and of the KL term.
struct Divisors {
    double loss = 1.0, kl = 1.0;
};

Divisors divisors(const LabelSums& sums, const LossSpec& spec) {
    if (spec.reduction != Reduction::mean) return {};
    const double voxels = static_cast<double>(sums.counted);
    return {spec.weight.data && spec.labels.tensor && !spec.labels.is_mask ? sums.weight : voxels, voxels};
}

bool has_gradient(const LossTensors& gradients) { return gradients.logits || gradients.soft_labels || gradients.mu || gradients.logvar; }

bool writes_over_logits(const LossArgs& args) { return args.gradients.logits && args.gradients.logits.data == args.tensors.logits.data; }

// The chunks' sums in the order of the chunks: the same for any number of threads. If only_if_all_count, the work ends
// soon after a voxel that does not.
LossSums run_loss(const Kernel<LossArgs>& kernel, LossArgs args, const Divisors& by, int num_threads, bool only_if_all_count = false) {
    args.upstream.scale /= by.loss;
    args.upstream.kl_scale /= by.kl;
    std::vector<LossSums> chunks(static_cast<std::size_t>(kernel.num_chunks(args)));
    args.chunk_sums = chunks.data();
    run(kernel, args, num_threads,
        [&](int64_t chunk) { return only_if_all_count && chunks[static_cast<std::size_t>(chunk)].uncounted > 0; });
    LossSums total;
    for (const LossSums& chunk : chunks) {
        total.loss += chunk.loss;
        total.kl += chunk.kl;
        total.uncounted += chunk.uncounted;
    }
    return total;
}

// Whether some of the labels, spread over each item, say that a voxel does not count: a border that was padded, say.
bool any_of_a_few_uncounted(const Labels& labels, const Shape& shape) {
    constexpr int64_t kFew = 64;
    const int64_t few = shape.S < kFew ? shape.S : kFew, step = few > 1 ? (shape.S - 1) / (few - 1) : 1;
    Labels some = labels;
    some.tensor.stride_s *= step;
    const LabelSums sums = scan(some, {shape.N, shape.C, few}, nullptr, 1);
    return sums.bad_position >= 0 || sums.counted < shape.N * few;
}

// With more classes the labels weigh little beside the logits, and to read them twice is not worth a risk.
constexpr int64_t kMaxClassesToAssume = 16;

// Whether to start as if every voxel counted, and to read the labels on the way. If it proves wrong, nothing may be lost.
bool assume_all_count(const LossArgs& args) {
    const LossSpec& spec = args.spec;
    if (writes_over_logits(args) || spec.labels.is_mask) return false;
    if (spec.reduction != Reduction::mean) return true;
    if (spec.weight.data) return false;
    if (!has_gradient(args.gradients) || !spec.labels.tensor) return true;
    return args.shape.C <= kMaxClassesToAssume && !any_of_a_few_uncounted(spec.labels, args.shape);
}

}  // namespace

Outcome loss(const Kernel<LossArgs>& kernel, const LossArgs& args, int num_threads) {
    const LossSpec& spec = args.spec;
    const bool assume = assume_all_count(args), scaled = spec.reduction == Reduction::mean && has_gradient(args.gradients);
    LabelSums labels;
    labels.counted = args.shape.voxels();
    LossSums total;
    if (assume) total = run_loss(kernel, args, divisors(labels, spec), num_threads, scaled);
    if (!assume || total.uncounted > 0) {
        labels = scan(spec.labels, args.shape, spec.weight.data, num_threads);
        if (labels.bad_position >= 0) return bad_label(labels);
        if (!assume || scaled) total = run_loss(kernel, args, divisors(labels, spec), num_threads);
    }
    const Divisors by = divisors(labels, spec);
    const double beta = spec.sampling.beta;
    return {total.loss / by.loss + (beta != 0.0 ? beta * total.kl / by.kl : 0.0), -1, 0};
}

Outcome sample_soft_labels(const SampleArgs& args, int num_threads) {
    return run_with_good_labels(kernels().sample_soft_labels, args, num_threads);
}

void sample_soft_labels_backward(const SampleArgs& args, int num_threads) { run(kernels().sample_soft_labels_backward, args, num_threads); }

Outcome blend_soft_labels(const BlendArgs& args, int num_threads) {
    return run_with_good_labels(kernels().blend_soft_labels, args, num_threads);
}

void accumulate_softmax(const AccumulateArgs& args, int num_threads) { run(kernels().accumulate_softmax, args, num_threads); }

void accumulate_softmax_backward(const AccumulateArgs& args, int num_threads) {
    run(kernels().accumulate_softmax_backward, args, num_threads);
}

BinsFault calibration_bins(BinsArgs args, int num_threads) {
    const auto& kernel = kernels().calibration_bins;
    std::vector<BinsFault> faults(static_cast<std::size_t>(kernel.num_chunks(args)));
    args.chunk_faults = faults.data();
    run(kernel, args, num_threads);
    for (const BinsFault& fault : faults)  // labels come first: scores are looked at with good labels only
        if (fault.label_position >= 0) return fault;
    for (const BinsFault& fault : faults)
        if (fault.score_position >= 0) return fault;
    return {};
}

Outcome ace_moments(const AceArgs& args, int num_threads) { return run_with_good_labels(kernels().ace_moments, args, num_threads); }

void ace_moments_backward(const AceArgs& args, int num_threads) { run(kernels().ace_moments_backward, args, num_threads); }

}  // namespace calseg
