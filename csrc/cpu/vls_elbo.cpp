// The stage-1 objective in dense form: the expected cross-entropy of the logit samples, plus KL; loss and gradients.
#include "cpu/gaussian.h"
#include "cpu/operations.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

template <class T>
Tiling tiling(const LossArgs& a) {
    return Tiling(a.shape, voxels_in_cache(a.shape.C, 2, sizeof(T)), 1 << 14);
}

template <bool kGradient, bool kKL, class T>
void run(const LossArgs& a, int64_t chunk, void* memory) {
    const Tiling tiles = tiling<T>(a);
    const int64_t C = a.shape.C;
    Scratch scratch(memory);
    LossTile<T> t(scratch, C, tiles.length, a.spec.weight.data);
    GaussianBlock<T> gaussian(scratch, a.spec.sampling, C);
    TensorTile<T> mu(scratch, a.tensors.mu, a.gradients.mu, a.shape, tiles.length);
    TensorTile<T> logvar(scratch, a.tensors.logvar, a.gradients.logvar, a.shape, tiles.length);
    const F<T> per_sample = broadcast<F<T>>(T(1) / static_cast<T>(a.spec.sampling.num_samples)), none = zero<T>();
    tiles.for_tiles(chunk, [&](const Span& span, const Span& next) {
        const int count = span.count;
        t.load(a.spec.labels, a.upstream, span, next);
        for (auto* tensor : {&mu, &logvar}) tensor->begin(span, next);
        if (t.any_ignored())
            for (auto* tensor : {&mu, &logvar}) clear_ignored(tensor->tile(), t.labels, count, C);
        for (int b = 0; b * kLanes < count; ++b) {
            t.labels_ahead.block(b);
            for (auto* tensor : {&mu, &logvar}) tensor->prefetch_next(b);
            const I<T> labels = load<I<T>>(t.labels + b * kLanes);
            const auto ignored = less(labels, broadcast<I<T>>(0));
            const F<T> kl =
                gaussian.template set<kKL>(mu.block(b), logvar.block(b), static_cast<uint64_t>(span.n * a.shape.S + span.s + b * kLanes));
            const F<T> loss = gaussian.template add_label_samples<kGradient>(labels);
            F<T> weight = none;
            for (int64_t c = 0; c < C; ++c)
                weight = select(equal(labels, broadcast<I<T>>(static_cast<int32_t>(c))), broadcast<F<T>>(t.weight[c]), weight);
            weight = weight * per_sample;
            if (kGradient)
                gaussian.template finish_gradients<kKL>(load<F<T>>(t.upstream + b * kLanes) * weight,
                                                        load<F<T>>(t.kl_upstream + b * kLanes) * broadcast<F<T>>(static_cast<T>(a.spec.sampling.beta)));
            store(t.loss + b * kLanes, select(ignored, none, loss * weight));
            store(t.kl + b * kLanes, select(ignored, none, kl));
        }
        for (auto* tensor : {&mu, &logvar}) tensor->end(span);
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
    const bool gradient = a.gradients.mu || a.gradients.logvar, with_kl = a.spec.sampling.beta != 0.0;
    if (gradient) with_kl ? run<true, true, T>(a, chunk, memory) : run<true, false, T>(a, chunk, memory);
    else with_kl ? run<false, true, T>(a, chunk, memory) : run<false, false, T>(a, chunk, memory);
}

template <class T>
int64_t bytes(const LossArgs& a) {
    const int64_t C = a.shape.C, length = tiling<T>(a).length;
    return LossTile<T>::bytes(C, length) + GaussianBlock<T>::bytes(C) + 2 * TensorTile<T>::bytes(C, length);
}

bool is_double(const LossArgs& a) { return a.tensors.mu.dtype == DType::f64; }
int64_t num_chunks(const LossArgs& a) { return is_double(a) ? tiling<double>(a).num_chunks() : tiling<float>(a).num_chunks(); }
int64_t scratch_bytes(const LossArgs& a) { return is_double(a) ? bytes<double>(a) : bytes<float>(a); }
void run_chunk(const LossArgs& a, int64_t chunk, void* scratch) {
    is_double(a) ? run<double>(a, chunk, scratch) : run<float>(a, chunk, scratch);
}

}  // namespace

const Kernel<LossArgs> vls_elbo = {num_chunks, scratch_bytes, run_chunk};

}  // namespace CALSEG_ISA
}  // namespace calseg
