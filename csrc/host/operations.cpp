#include "host/operations.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "host/dispatch.h"
#include "host/parallel.h"

namespace calseg {
namespace {

struct FreeAligned {
    void operator()(void* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};

// State of a call of a kernel, which the threads share. After each chunk, stop_after(chunk) says whether to skip the chunks
// that have not begun.
template <class Args, class StopAfter>
struct KernelCall {
    const Kernel<Args>& kernel;
    const Args& args;
    const StopAfter& stop_after;
    char* scratch;
    int64_t scratch_bytes;
    std::atomic<bool> stopped{false};

    static void compute_chunk(void* context, int64_t chunk, int thread) {
        KernelCall& call = *static_cast<KernelCall*>(context);
        if (call.stopped.load(std::memory_order_relaxed)) return;
        call.kernel.compute_chunk(call.args, chunk, call.scratch + thread * call.scratch_bytes);
        if (call.stop_after(chunk)) call.stopped.store(true, std::memory_order_relaxed);
    }
};

// Size up to which scratch memory lies on the stack. For small inputs, an allocation on the heap would take longer than the
// computation.
constexpr int64_t kStackBytes = 1 << 14;

// Computes all chunks of a kernel.
template <class Args, class StopAfter>
void compute(const Kernel<Args>& kernel, const Args& args, int num_threads, const StopAfter& stop_after) {
    const int64_t chunks = kernel.num_chunks(args);
    const int64_t useful = args.shape.voxels() * args.shape.C / kElementsPerThread + 1;
    if (useful < num_threads) num_threads = static_cast<int>(useful);
    if (chunks < num_threads) num_threads = static_cast<int>(chunks);
    if (chunks == 0) return;
    const int64_t bytes = (kernel.scratch_bytes(args) + 63) / 64 * 64, all_bytes = bytes * num_threads + 64;
    alignas(64) char on_stack[kStackBytes];
    std::unique_ptr<void, FreeAligned> on_heap;
    if (all_bytes > kStackBytes) on_heap.reset(::operator new[](static_cast<std::size_t>(all_bytes), std::align_val_t{64}));
    using Call = KernelCall<Args, StopAfter>;
    Call call{kernel, args, stop_after, on_heap ? static_cast<char*>(on_heap.get()) : on_stack, bytes};
    parallel_for(chunks, num_threads, &Call::compute_chunk, &call);
}

template <class Args>
void compute(const Kernel<Args>& kernel, const Args& args, int num_threads) {
    compute(kernel, args, num_threads, [](int64_t) { return false; });
}

// Reads all labels. `weight` may be null.
LabelSums scan(const Labels& labels, const Shape& shape, const double* weight, int num_threads) {
    LabelSums total;
    if (!labels.tensor) {
        total.counted = shape.voxels();
        return total;
    }
    ScanArgs args{shape, labels, labels.is_mask ? nullptr : weight, nullptr};
    const Kernel<ScanArgs>& kernel = kernels(DType::f32).scan_labels;
    std::vector<LabelSums> sums(static_cast<std::size_t>(kernel.num_chunks(args)));
    args.chunk_sums = sums.data();
    compute(kernel, args, num_threads);
    for (const LabelSums& chunk : sums) {
        total.counted += chunk.counted;
        total.weight += chunk.weight;
        if (total.bad_position < 0 && chunk.bad_position >= 0) {
            total.bad_position = chunk.bad_position;
        }
    }
    return total;
}

LabelFault fault_of(const LabelSums& sums) { return {sums.bad_position}; }

// Runs a kernel, unless a label is out of range.
template <class Args>
LabelFault compute_with_good_labels(const Kernel<Args>& kernel, Args& args, int num_threads) {
    const LabelSums labels = scan(args.spec.labels, args.shape, nullptr, num_threads);
    if (labels.bad_position >= 0) return fault_of(labels);
    compute(kernel, args, num_threads);
    return {};
}

// Divisors of the sums over voxels: of the loss, and of the KL term.
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

// Computes all chunks of a loss and returns its sums over voxels. The sums of the chunks are added in the order of the
// chunks, so that the result is the same for any number of threads. If only_if_all_count, chunks are skipped once a voxel
// is found that does not count.
LossSums compute_loss(const Kernel<LossArgs>& kernel, LossArgs args, const Divisors& by, int num_threads, bool only_if_all_count = false) {
    args.upstream.scale *= args.spec.scale / by.loss;
    args.upstream.kl_scale *= args.spec.scale / by.kl;
    const auto num_chunks = static_cast<std::size_t>(kernel.num_chunks(args));
    std::vector<LossSums> chunks(num_chunks);
    args.chunk_sums = chunks.data();
    const auto overlaps = static_cast<std::size_t>(args.overlap_sums ? args.shape.C * kOverlapSums : 0);
    std::vector<double> overlap(num_chunks * overlaps);
    args.chunk_overlap = overlap.data();
    compute(kernel, args, num_threads,
            [&](int64_t chunk) { return only_if_all_count && chunks[static_cast<std::size_t>(chunk)].uncounted > 0; });
    LossSums total;
    for (const LossSums& chunk : chunks) {
        total.loss += chunk.loss;
        total.kl += chunk.kl;
        total.uncounted += chunk.uncounted;
    }
    if (overlaps > 0) std::fill_n(args.overlap_sums, args.shape.N * static_cast<int64_t>(overlaps), 0.0);
    for (std::size_t i = 0; i < overlap.size(); ++i) {  // an item has as many chunks as any other one
        const std::size_t item = i / overlaps * static_cast<std::size_t>(args.shape.N) / num_chunks;
        args.overlap_sums[item * overlaps + i % overlaps] += overlap[i];
    }
    return total;
}

// Returns whether a sample of the labels, spread evenly over each item, has a voxel that does not count. A padded border,
// for example, shows in such a sample.
bool sample_has_uncounted(const Labels& labels, const Shape& shape) {
    constexpr int64_t kSample = 64;  // voxels of an item
    const int64_t count = shape.S < kSample ? shape.S : kSample, step = count > 1 ? (shape.S - 1) / (count - 1) : 1;
    Labels sample = labels;
    sample.tensor.stride_s *= step;
    const LabelSums sums = scan(sample, {shape.N, shape.C, count}, nullptr, 1);
    return sums.bad_position >= 0 || sums.counted < shape.N * count;
}

// Largest number of classes for which assume_all_count() may be true if the mean has gradients. With more classes, reading
// the labels first takes little time compared with reading the logits, and a wrong assumption costs more.
constexpr int64_t kMaxClassesToAssume = 16;

// Returns whether to compute the loss under the assumption that every voxel counts, without reading the labels first. The
// kernel reads them anyway, and finds out whether the assumption is right. If it is wrong, the loss is computed again or
// divided by other numbers, so a kernel must not overwrite its input then.
bool assume_all_count(const LossArgs& args) {
    const LossSpec& spec = args.spec;
    if (writes_over_logits(args) || spec.labels.is_mask) return false;
    if (spec.reduction != Reduction::mean) return true;
    if (spec.weight.data) return false;
    if (!has_gradient(args.gradients) || !spec.labels.tensor) return true;
    return args.shape.C <= kMaxClassesToAssume && !sample_has_uncounted(spec.labels, args.shape);
}

}  // namespace

LabelFault loss(const Kernel<LossArgs>& kernel, const LossArgs& args, int num_threads) {
    const LossSpec& spec = args.spec;
    const bool assume = assume_all_count(args);
    // The gradients of a mean are divided by a number that depends on all labels. With other labels they must be computed again.
    const bool divides_gradients = spec.reduction == Reduction::mean && has_gradient(args.gradients);
    LabelSums labels;
    labels.counted = args.shape.voxels();
    LossSums total;
    if (assume) total = compute_loss(kernel, args, divisors(labels, spec), num_threads, divides_gradients);
    if (!assume || total.uncounted > 0) {
        labels = scan(spec.labels, args.shape, spec.weight.data, num_threads);
        if (labels.bad_position >= 0) return fault_of(labels);
        if (!assume || divides_gradients) total = compute_loss(kernel, args, divisors(labels, spec), num_threads);
    }
    const Divisors by = divisors(labels, spec);
    const double beta = spec.sampling.beta;
    if (args.divisor) *args.divisor = by.loss;
    if (args.reduced) {
        const double value = spec.scale * (total.loss / by.loss + (beta != 0.0 ? beta * total.kl / by.kl : 0.0));
        if (scores_dtype(args) == DType::f64) *static_cast<double*>(args.reduced) = value;
        else *static_cast<float*>(args.reduced) = static_cast<float>(value);
    }
    return {};
}

LabelFault loss_and_overlap(LossArgs& args, int num_threads) {
    const KernelTable& table = kernels(scores_dtype(args));
    return loss(args.tensors.mu ? table.vls_cross_entropy : table.cross_entropy, args, num_threads);
}

LabelFault overlap_backward(LossArgs& args, int num_threads) { return loss(kernels(scores_dtype(args)).cross_entropy, args, num_threads); }

LabelFault sample_soft_labels(SampleArgs& args, int num_threads) {
    return compute_with_good_labels(kernels(scores_dtype(args)).sample_soft_labels, args, num_threads);
}

void sample_soft_labels_backward(SampleArgs& args, int num_threads) {
    compute(kernels(scores_dtype(args)).sample_soft_labels_backward, args, num_threads);
}

LabelFault blend_soft_labels(BlendArgs& args, int num_threads) {
    return compute_with_good_labels(kernels(scores_dtype(args)).blend_soft_labels, args, num_threads);
}

void accumulate_softmax(AccumulateArgs& args, int num_threads) {
    compute(kernels(scores_dtype(args)).accumulate_softmax, args, num_threads);
}

void accumulate_softmax_backward(AccumulateArgs& args, int num_threads) {
    compute(kernels(scores_dtype(args)).accumulate_softmax_backward, args, num_threads);
}

BinsFault calibration_bins(BinsArgs& args, int num_threads) {
    const auto& kernel = kernels(scores_dtype(args)).calibration_bins;
    std::vector<BinsFault> faults(static_cast<std::size_t>(kernel.num_chunks(args)));
    args.chunk_faults = faults.data();
    compute(kernel, args, num_threads);
    for (const BinsFault& fault : faults)  // report labels first, because scores are only checked where labels are good
        if (fault.label_position >= 0) return fault;
    for (const BinsFault& fault : faults)
        if (fault.score_position >= 0) return fault;
    return {};
}

LabelFault ace_moments(AceArgs& args, int num_threads) {
    return compute_with_good_labels(kernels(scores_dtype(args)).ace_moments, args, num_threads);
}

void ace_moments_backward(AceArgs& args, int num_threads) { compute(kernels(scores_dtype(args)).ace_moments_backward, args, num_threads); }

}  // namespace calseg
