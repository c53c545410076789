// Kernel of vls_elbo, the objective of stage 1: expected cross-entropy of the sampled logits plus the KL term, and the
// gradients of mu and logvar, in one pass.
//
// Least memory traffic: one read of mu and of logvar, and one write of each gradient. Drawing num_samples * C normals for
// each voxel takes longer than that.
#include "cpu/gaussian.h"
#include "cpu/kernel.h"
#include "cpu/loss_tile.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

template <bool kGradient, bool kKL, class T>
void compute(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    const int64_t C = a.shape.C;
    LossTile<T> t(scratch, C, tiles.length, a.spec.weight.data);
    GaussianBlock<T> gaussian(scratch, a.spec.sampling, C);
    TensorTile<T> mu(scratch, a.tensors.mu, a.gradients.mu, a.shape, tiles.length);
    TensorTile<T> logvar(scratch, a.tensors.logvar, a.gradients.logvar, a.shape, tiles.length);
    if (scratch.is_counting()) return;
    const F<T> per_sample = broadcast<F<T>>(T(1) / static_cast<T>(a.spec.sampling.num_samples)), none = zero<T>();
    for (const auto& [span, next] : TilesOfChunk(tiles, chunk)) {
        const int count = span.count;
        t.load(a.spec.labels, a.upstream, span, next);
        for (auto* tensor : {&mu, &logvar}) tensor->begin(span, next);
        if (t.any_ignored())
            for (auto* tensor : {&mu, &logvar}) clear_ignored(tensor->tile(), t.labels, count, C);
        for (int b = 0; b * kLanes < count; ++b) {
            t.labels_ahead.prefetch(b);
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
                gaussian.template finish_gradients<kKL>(
                    load<F<T>>(t.upstream + b * kLanes) * weight,
                    load<F<T>>(t.kl_upstream + b * kLanes) * broadcast<F<T>>(static_cast<T>(a.spec.sampling.beta)));
            store(t.loss + b * kLanes, select(ignored, none, loss * weight));
            store(t.kl + b * kLanes, select(ignored, none, kl));
        }
        for (auto* tensor : {&mu, &logvar}) tensor->end(span);
        t.template finish_tile<kKL>(a, span);
    }
    t.finish_chunk(a.chunk_sums, chunk);
}

struct VLSElbo : TiledForFirstCache<LossArgs, 2, 1 << 14> {
    template <class T>
    static void compute_chunk(const Args& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
        const bool gradient = a.gradients.mu || a.gradients.logvar, with_kl = a.spec.sampling.beta != 0.0;
        if (gradient) with_kl ? compute<true, true, T>(a, tiles, chunk, scratch) : compute<true, false, T>(a, tiles, chunk, scratch);
        else with_kl ? compute<false, true, T>(a, tiles, chunk, scratch) : compute<false, false, T>(a, tiles, chunk, scratch);
    }
};

}  // namespace

const Kernel<LossArgs> vls_elbo = make_kernel<VLSElbo>();

}  // namespace CALSEG_ISA
}  // namespace calseg
