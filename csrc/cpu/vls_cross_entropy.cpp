// Kernel of vls_cross_entropy: cross-entropy with sampled soft labels plus the KL term, and the gradients of logits, mu and
// logvar, in one pass.
//
// Least memory traffic: one read of each input, and one write of each gradient. Drawing num_samples * C normals for each
// voxel takes longer than that.
#include <limits>

#include "cpu/gaussian.h"
#include "cpu/kernel.h"
#include "cpu/overlap.h"
#include "cpu/soft_cross_entropy.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Intermediate results of one block, beside the tiles of the three tensors.
template <class T>
struct BlockRows {
    T* e;              // [C][kLanes] exp(logits - max)
    T* soft;           // [C][kLanes] sum of the samples, then soft labels
    T* grad_estimate;  // [C][kLanes] gradient of the estimate, which is the mean of the samples

    BlockRows(Scratch& scratch, int64_t C)
        : e(scratch.take<T>(C * kLanes)), soft(scratch.take<T>(C * kLanes)), grad_estimate(scratch.take<T>(C * kLanes)) {}
};

// Factors that are the same for all blocks.
template <class T>
struct Factors {
    static constexpr double kUnitSlope = GaussianBlock<T>::kUnitSlope;

    Smoothing<T> smoothing;
    T on_label;     // factor of the one-hot labels in the soft labels
    T on_estimate;  // factor of the sum of the samples in the soft labels
    T to_estimate;  // factor of weight * log p in the gradient of the estimate, times kUnitSlope
    T to_samples;   // factor of the gradient through the samples, divided by kUnitSlope
    T to_kl;        // factor of the gradient of the KL term
    bool plain;     // whether there are neither class weights nor label smoothing

    explicit Factors(const LossArgs& a)
        : smoothing(a.spec.label_smoothing, a.shape.C),
          on_label(T(1) - static_cast<T>(a.spec.alpha)),
          on_estimate(static_cast<T>(a.spec.alpha) / static_cast<T>(a.spec.sampling.num_samples)),
          to_estimate(-smoothing.keep * static_cast<T>(a.spec.alpha * kUnitSlope)),
          to_samples(T(1) / (static_cast<T>(a.spec.sampling.num_samples) * static_cast<T>(a.spec.sampling.temperature * kUnitSlope))),
          to_kl(static_cast<T>(a.spec.sampling.beta)),
          plain(!a.spec.weight.data && a.spec.label_smoothing == 0.0) {}

    // Returns the soft labels of class c. `samples` holds the sum of the samples.
    CALSEG_MEMBER F<T> blend(I<T> labels, int64_t c, const T* samples) const {
        const F<T> hard = select(equal(labels, broadcast<I<T>>(static_cast<int32_t>(c))), broadcast<F<T>>(on_label), zero<T>());
        return hard + broadcast<F<T>>(on_estimate) * load<F<T>>(samples + c * kLanes);
    }
};

// Returns the losses of a block. On entry, w.soft holds the sum of the samples, and `logits` holds log p. If with_logits,
// logits become the gradient of the logits.
template <int kClasses, class T>
CALSEG_INLINE F<T> blended_cross_entropy(const Factors<T>& f, bool with_logits, const LossTile<T>& t, const BlockRows<T>& w, int block,
                                         T* logits, F<T> sum) {
    const int64_t C = kClasses ? kClasses : t.C;
    const I<T> labels = load<I<T>>(t.labels + block * kLanes);
    for (int64_t c = 0; c < C; ++c) store(w.soft + c * kLanes, f.blend(labels, c, w.soft));
    return soft_cross_entropy_block(t, block, C, logits, w.e, sum, w.soft, f.smoothing, with_logits, false);
}

// Does as blended_cross_entropy() without class weights and label smoothing. The soft labels then sum to 1 over classes, so
// one pass over the classes is enough.
template <int kClasses, class T>
CALSEG_INLINE F<T> plain_cross_entropy(const Factors<T>& f, bool with_logits, const LossTile<T>& t, const BlockRows<T>& w, int block,
                                       T* logits, F<T> sum) {
    const int64_t C = kClasses ? kClasses : t.C;
    const I<T> labels = load<I<T>>(t.labels + block * kLanes);
    const F<T> upstream = load<F<T>>(t.upstream + block * kLanes), scale_p = upstream * reciprocal(sum), none = zero<T>();
    F<T> loss = none;
    for (int64_t c = 0; c < C; ++c) {
        const F<T> y = f.blend(labels, c, w.soft), log_p = load<F<T>>(logits + c * kLanes);
        loss = loss - select(equal(y, none), none, y * log_p);  // 0 where y is 0, even if log p is -inf
        if (with_logits) store(logits + c * kLanes, load<F<T>>(w.e + c * kLanes) * scale_p - upstream * y);
    }
    return select(less(labels, broadcast<I<T>>(0)), none, loss);
}

// Adds the overlap of a block, and turns the logits into the soft labels. On entry, w.soft holds the sum of the samples if
// the loss is plain, else the soft labels.
template <class T>
CALSEG_INLINE void add_overlap(const Factors<T>& f, OverlapSums<T>& overlap, int64_t C, I<T> labels, const BlockRows<T>& w, T* logits,
                               F<T> sum) {
    const F<T> per_sum = per_sum_where_counted<T>(labels, sum), none = zero<T>();
    const auto ignored = less(labels, broadcast<I<T>>(0));
    for (int64_t c = 0; c < C; ++c) {
        const F<T> y = select(ignored, none, f.plain ? f.blend(labels, c, w.soft) : load<F<T>>(w.soft + c * kLanes));
        overlap.add(c, load<F<T>>(w.e + c * kLanes) * per_sum, y);
        store(logits + c * kLanes, y);
    }
}

// Computes a block: stores its losses and KL terms, and turns logits, mu and logvar into their gradients. The logits become
// a gradient only if with_logits, mu and logvar only if kGaussianGradient. With an overlap, they become the soft labels.
template <int kClasses, bool kGaussianGradient, bool kKL, class T>
CALSEG_INLINE void compute_block(const Factors<T>& f, bool with_logits, LossTile<T>& t, GaussianBlock<T, kClasses>& gaussian,
                                 OverlapSums<T>& overlap, const BlockRows<T>& w, int block, uint64_t first_voxel,
                                 TensorTile<T>& logits_tile, TensorTile<T>& mu_tile, TensorTile<T>& logvar_tile) {
    const int64_t C = kClasses ? kClasses : t.C;
    const I<T> labels = load<I<T>>(t.labels + block * kLanes);
    const F<T> none = zero<T>();
    T* logits = logits_tile.block(block);
    t.labels_ahead.prefetch(block);
    mu_tile.prefetch_next(block);
    const F<T> sum = exponentials_block(logits, w.e, C);
    // set() does not need the sum. It comes before the logarithm of the sum, which would wait for the sum.
    const F<T> kl = gaussian.template set<kKL>(mu_tile.block(block), logvar_tile.block(block), first_voxel);
    logits_tile.prefetch_next(block);
    // The gradient of the estimate needs no sample, so it is known before sampling. Where log p is -inf, it gets a finite
    // value: times a probability of 0, an infinite one would give NaN.
    const F<T> lowest = broadcast<F<T>>(std::numeric_limits<T>::lowest());
    log_softmax_block(logits, sum, C, [&](int64_t c, F<T> log_p) {
        const F<T> scale = broadcast<F<T>>(f.to_estimate * t.weight[c]);
        if (kGaussianGradient) store(w.grad_estimate + c * kLanes, scale * larger(lowest, log_p));
    });
    if (f.on_estimate != T(0)) gaussian.template add_samples<true, kGaussianGradient>(w.soft, w.grad_estimate);
    else {
        clear_block(w.soft, C);
        gaussian.clear_gradients();
    }

    logvar_tile.prefetch_next(block);
    const F<T> loss = f.plain ? plain_cross_entropy<kClasses>(f, with_logits, t, w, block, logits, sum)
                              : blended_cross_entropy<kClasses>(f, with_logits, t, w, block, logits, sum);
    if (overlap) add_overlap(f, overlap, C, labels, w, logits, sum);
    if (kGaussianGradient) {
        const F<T> to_samples = broadcast<F<T>>(f.to_samples), to_kl = broadcast<F<T>>(f.to_kl);
        gaussian.template finish_gradients<kKL>(load<F<T>>(t.upstream + block * kLanes) * to_samples,
                                                load<F<T>>(t.kl_upstream + block * kLanes) * to_kl);
    }
    store(t.loss + block * kLanes, loss);
    store(t.kl + block * kLanes, select(less(labels, broadcast<I<T>>(0)), none, kl));
}

template <int kClasses, bool kGaussianGradient, bool kKL, class T>
void compute(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    const int64_t C = a.shape.C;
    LossTile<T> t(scratch, C, tiles.length, a.spec.weight.data);
    GaussianBlock<T, kClasses> gaussian(scratch, a.spec.sampling, C);
    const BlockRows<T> rows(scratch, C);
    OverlapSums<T> overlap(scratch, C, a.overlap_sums != nullptr);
    TensorTile<T> logits(scratch, a.tensors.logits, a.gradients.logits, a.shape, tiles.length);
    TensorTile<T> mu(scratch, a.tensors.mu, a.gradients.mu, a.shape, tiles.length);
    TensorTile<T> logvar(scratch, a.tensors.logvar, a.gradients.logvar, a.shape, tiles.length);
    if (scratch.is_counting()) return;
    const Factors<T> factors(a);
    for (const auto& [span, next] : TilesOfChunk(tiles, chunk)) {
        const int count = span.count;
        t.load(a.spec.labels, a.upstream, span, next);
        for (auto* tensor : {&logits, &mu, &logvar}) tensor->begin(span, next);
        if (t.any_ignored())
            for (auto* tensor : {&logits, &mu, &logvar}) clear_ignored(tensor->tile(), t.labels, count, C);
        for (int b = 0; b * kLanes < count; ++b) {
            const auto first_voxel = static_cast<uint64_t>(span.n * a.shape.S + span.s + b * kLanes);
            compute_block<kClasses, kGaussianGradient, kKL>(factors, a.gradients.logits && !overlap, t, gaussian, overlap, rows, b,
                                                            first_voxel, logits, mu, logvar);
        }
        overlap.finish_tile(count);
        for (auto* tensor : {&logits, &mu, &logvar}) tensor->end(span);
        t.template finish_tile<kKL>(a, span);
    }
    overlap.finish_chunk(a.chunk_overlap, chunk);
    t.finish_chunk(a.chunk_sums, chunk);
}

struct VLSCrossEntropy : TiledForFirstCache<LossArgs, 3, 1 << 14> {
    template <class T>
    static void compute_chunk(const Args& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
        if (!a.gradients.mu && !a.gradients.logvar) return compute_with_kl<0, false, T>(a, tiles, chunk, scratch);
        if constexpr (std::is_same<T, float>::value) {  // for few classes, constants let the compiler unroll the loops
            if constexpr (kMostFewClasses >= 2)
                if (a.shape.C == 2) return compute_with_kl<2, true, T>(a, tiles, chunk, scratch);
            if constexpr (kMostFewClasses >= 4)
                if (a.shape.C == 4) return compute_with_kl<4, true, T>(a, tiles, chunk, scratch);
        }
        compute_with_kl<0, true, T>(a, tiles, chunk, scratch);
    }

 private:
    template <int kClasses, bool kGaussianGradient, class T>
    static void compute_with_kl(const Args& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
        a.spec.sampling.beta != 0.0 ? compute<kClasses, kGaussianGradient, true, T>(a, tiles, chunk, scratch)
                                    : compute<kClasses, kGaussianGradient, false, T>(a, tiles, chunk, scratch);
    }
};

}  // namespace

const Kernel<LossArgs> vls_cross_entropy = make_kernel<VLSCrossEntropy>();

}  // namespace CALSEG_ISA
}  // namespace calseg
