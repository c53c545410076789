// Kernel of gaussian_kl: KL(N(mu, exp(logvar)) || prior) summed over classes, and its gradients, in one pass.
//
// Least memory traffic: one read of mu and of logvar, and one write of each gradient.
#include "cpu/gaussian.h"
#include "cpu/kernel.h"
#include "cpu/loss_tile.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

struct GaussianKL : TiledForFirstCache<LossArgs, 2, 1 << 15> {
    template <class T>
    static void compute_chunk(const Args& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
        LossTile<T> t(scratch, a.shape.C, tiles.length, nullptr);
        GaussianBlock<T> gaussian(scratch, a.spec.sampling, a.shape.C);
        TensorTile<T> mu(scratch, a.tensors.mu, a.gradients.mu, a.shape, tiles.length);
        TensorTile<T> logvar(scratch, a.tensors.logvar, a.gradients.logvar, a.shape, tiles.length);
        if (scratch.is_counting()) return;
        const bool gradient = a.gradients.mu || a.gradients.logvar;
        gaussian.clear_gradients();  // there are no samples, so the gradients are those of the KL term alone
        for (const auto& [span, next] : TilesOfChunk(tiles, chunk)) {
            t.load(Labels(), a.upstream, span, next);
            for (auto* tensor : {&mu, &logvar}) tensor->begin(span, next);
            for (int b = 0; b * kLanes < span.count; ++b) {
                for (auto* tensor : {&mu, &logvar}) tensor->prefetch_next(b);
                store(t.loss + b * kLanes, zero<T>());
                store(t.kl + b * kLanes, gaussian.template set<true>(mu.block(b), logvar.block(b), 0));
                if (gradient) gaussian.template finish_gradients<true>(zero<T>(), load<F<T>>(t.kl_upstream + b * kLanes));
            }
            for (auto* tensor : {&mu, &logvar}) tensor->end(span);
            t.template finish_tile<true>(a, span);
        }
        t.finish_chunk(a.chunk_sums, chunk);
    }
};

}  // namespace

const Kernel<LossArgs> gaussian_kl = make_kernel<GaussianKL>();

}  // namespace CALSEG_ISA
}  // namespace calseg
