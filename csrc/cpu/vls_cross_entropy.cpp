// Cross-entropy on sampled soft labels, plus KL: the loss and the gradients of logits, mu and logvar in one pass.
// Floor: one read of each input, one write of each gradient; num_samples * C normals a voxel (the arithmetic wins).
#include <limits>

#include "cpu/gaussian.h"
#include "cpu/operations.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

template <class T>
Tiling tiling(const LossArgs& a) {
    return Tiling(a.shape, voxels_in_cache(a.shape.C, 3, sizeof(T)), 1 << 14);
}

// The working set of one block, beside the three tensors of the tile.
template <class T>
struct Work {
    T *e, *soft, *grad_estimate;  // [C][kLanes]

    static int64_t bytes(int64_t C) { return 3 * Scratch::bytes<T>(C * kLanes); }
    Work(Scratch& scratch, int64_t C)
        : e(scratch.take<T>(C * kLanes)), soft(scratch.take<T>(C * kLanes)), grad_estimate(scratch.take<T>(C * kLanes)) {}
};

// The numbers of a call, made once.
template <class T>
struct Factors {
    Smoothing<T> smoothing;
    T on_label, on_estimate, to_estimate;  // of the one-hot labels and of the sum of samples; of dLoss/dy_hat
    T to_samples, to_kl;                   // of the gradients through the samples and of the KL term
    bool plain;                            // neither class weights nor smoothing

    explicit Factors(const LossArgs& a)
        : smoothing(a.spec.label_smoothing, a.shape.C),
          on_label(T(1) - static_cast<T>(a.spec.alpha)),
          on_estimate(static_cast<T>(a.spec.alpha) / static_cast<T>(a.spec.sampling.num_samples)),
          to_estimate(-smoothing.keep * static_cast<T>(a.spec.alpha)),
          to_samples(T(1) / (static_cast<T>(a.spec.sampling.num_samples) * static_cast<T>(a.spec.sampling.temperature))),
          to_kl(static_cast<T>(a.spec.sampling.beta)),
          plain(!a.spec.weight.data && a.spec.label_smoothing == 0.0) {}

    // The soft labels of class c, where `samples` holds the sum of the estimates.
    CALSEG_MEMBER F<T> blend(I<T> labels, int64_t c, const T* samples) const {
        const F<T> hard = select(equal(labels, broadcast<I<T>>(static_cast<int32_t>(c))), broadcast<F<T>>(on_label), zero<T>());
        return hard + broadcast<F<T>>(on_estimate) * load<F<T>>(samples + c * kLanes);
    }
};

// The loss of a block with the sum of its samples in w.soft, and the gradient of its logits, which are log p, in their place.
template <int kClasses, class T>
CALSEG_INLINE F<T> blended_cross_entropy(const Factors<T>& f, bool with_logits, const LossTile<T>& t, const Work<T>& w, int block,
                                         T* logits, F<T> sum) {
    const int64_t C = kClasses ? kClasses : t.C;
    const I<T> labels = load<I<T>>(t.labels + block * kLanes);
    for (int64_t c = 0; c < C; ++c) store(w.soft + c * kLanes, f.blend(labels, c, w.soft));
    return soft_cross_entropy_block(t, block, C, logits, w.e, sum, w.soft, f.smoothing, with_logits, false);
}

// The same without class weights and smoothing: a blend sums to 1, so that one pass over the classes does.
template <int kClasses, class T>
CALSEG_INLINE F<T> plain_cross_entropy(const Factors<T>& f, bool with_logits, const LossTile<T>& t, const Work<T>& w, int block, T* logits,
                                       F<T> sum) {
    const int64_t C = kClasses ? kClasses : t.C;
    const I<T> labels = load<I<T>>(t.labels + block * kLanes);
    const F<T> upstream = load<F<T>>(t.upstream + block * kLanes), scale_p = upstream * reciprocal(sum), none = zero<T>();
    F<T> loss = none;
    for (int64_t c = 0; c < C; ++c) {
        const F<T> y = f.blend(labels, c, w.soft), log_p = load<F<T>>(logits + c * kLanes);
        loss = loss - select(equal(y, none), none, y * log_p);  // the limit of t log t is 0, also where log p is -inf
        if (with_logits) store(logits + c * kLanes, load<F<T>>(w.e + c * kLanes) * scale_p - upstream * y);
    }
    return select(less(labels, broadcast<I<T>>(0)), none, loss);
}

// A block of logits, mu and logvar becomes their gradients; that of the logits only if with_logits.
template <int kClasses, bool kGaussianGradient, bool kKL, class T>
CALSEG_INLINE void run_block(const Factors<T>& f, bool with_logits, LossTile<T>& t, GaussianBlock<T, kClasses>& gaussian, const Work<T>& w,
                             int block, uint64_t first_voxel, TensorTile<T>& logits_tile, TensorTile<T>& mu_tile,
                             TensorTile<T>& logvar_tile) {
    const int64_t C = kClasses ? kClasses : t.C;
    const I<T> labels = load<I<T>>(t.labels + block * kLanes), ignored_label = broadcast<I<T>>(0);
    const F<T> none = zero<T>();
    T* logits = logits_tile.block(block);
    t.labels_ahead.block(block);
    mu_tile.prefetch_next(block);
    const F<T> sum = exponentials_block(logits, w.e, C);
    // what does not need the sum comes before its logarithm, which would have to be waited for
    const F<T> kl = gaussian.template set<kKL>(mu_tile.block(block), logvar_tile.block(block), first_voxel);
    logits_tile.prefetch_next(block);
    // dl/dy_hat needs no sample. An impossible class (log p = -inf) stays finite, so that no mass on it is no NaN.
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
    if (kGaussianGradient) {
        const F<T> to_samples = broadcast<F<T>>(f.to_samples), to_kl = broadcast<F<T>>(f.to_kl);
        gaussian.template finish_gradients<kKL>(load<F<T>>(t.upstream + block * kLanes) * to_samples,
                                                load<F<T>>(t.kl_upstream + block * kLanes) * to_kl);
    }
    store(t.loss + block * kLanes, loss);
    store(t.kl + block * kLanes, select(less(labels, ignored_label), none, kl));
}

template <int kClasses, bool kGaussianGradient, bool kKL, class T>
void run(const LossArgs& a, int64_t chunk, void* memory) {
    const Tiling tiles = tiling<T>(a);
    const int64_t C = a.shape.C;
    Scratch scratch(memory);
    LossTile<T> t(scratch, C, tiles.length, a.spec.weight.data);
    GaussianBlock<T, kClasses> gaussian(scratch, a.spec.sampling, C);
    const Work<T> work(scratch, C);
    const Factors<T> factors(a);
    TensorTile<T> logits(scratch, a.tensors.logits, a.gradients.logits, a.shape, tiles.length);
    TensorTile<T> mu(scratch, a.tensors.mu, a.gradients.mu, a.shape, tiles.length);
    TensorTile<T> logvar(scratch, a.tensors.logvar, a.gradients.logvar, a.shape, tiles.length);
    tiles.for_tiles(chunk, [&](const Span& span, const Span& next) {
        const int count = span.count;
        t.load(a.spec.labels, a.upstream, span, next);
        for (auto* tensor : {&logits, &mu, &logvar}) tensor->begin(span, next);
        if (t.any_ignored())
            for (auto* tensor : {&logits, &mu, &logvar}) clear_ignored(tensor->tile(), t.labels, count, C);
        for (int b = 0; b * kLanes < count; ++b) {
            const auto first_voxel = static_cast<uint64_t>(span.n * a.shape.S + span.s + b * kLanes);
            run_block<kClasses, kGaussianGradient, kKL>(factors, bool(a.gradients.logits), t, gaussian, work, b, first_voxel, logits, mu,
                                                        logvar);
        }
        for (auto* tensor : {&logits, &mu, &logvar}) tensor->end(span);
        t.sums.loss += sum_row(t.loss, count);
        if (kKL) t.sums.kl += sum_row(t.kl, count);
        if (a.loss) {
            if (kKL)
                for (int i = 0; i < count; ++i) t.loss[i] += static_cast<T>(a.spec.sampling.beta) * t.kl[i];
            store_tile(a.loss, span, t.loss, 1, false);
        }
    });
    if (a.chunk_sums) a.chunk_sums[chunk] = t.sums;
}

template <class T>
void run(const LossArgs& a, int64_t chunk, void* memory) {
    const bool with_kl = a.spec.sampling.beta != 0.0;
    if (!a.gradients.mu && !a.gradients.logvar) return with_kl ? run<0, false, true, T>(a, chunk, memory) : run<0, false, false, T>(a, chunk, memory);
    const auto run_gradients = [&](auto classes) {
        constexpr int kClasses = decltype(classes)::value;
        with_kl ? run<kClasses, true, true, T>(a, chunk, memory) : run<kClasses, true, false, T>(a, chunk, memory);
    };
    if constexpr (std::is_same<T, float>::value) {  // loops over few classes are worth unrolling
        if (a.shape.C == 2) return run_gradients(std::integral_constant<int, 2>());
        if (a.shape.C == 4) return run_gradients(std::integral_constant<int, 4>());
    }
    run_gradients(std::integral_constant<int, 0>());
}

template <class T>
int64_t bytes(const LossArgs& a) {
    const int64_t C = a.shape.C, length = tiling<T>(a).length;
    return LossTile<T>::bytes(C, length) + GaussianBlock<T>::bytes(C) + Work<T>::bytes(C) + 3 * TensorTile<T>::bytes(C, length);
}

bool is_double(const LossArgs& a) { return a.tensors.logits.dtype == DType::f64; }
int64_t num_chunks(const LossArgs& a) { return is_double(a) ? tiling<double>(a).num_chunks() : tiling<float>(a).num_chunks(); }
int64_t scratch_bytes(const LossArgs& a) { return is_double(a) ? bytes<double>(a) : bytes<float>(a); }
void run_chunk(const LossArgs& a, int64_t chunk, void* scratch) {
    is_double(a) ? run<double>(a, chunk, scratch) : run<float>(a, chunk, scratch);
}

}  // namespace

const Kernel<LossArgs> vls_cross_entropy = {num_chunks, scratch_bytes, run_chunk};

}  // namespace CALSEG_ISA
}  // namespace calseg
