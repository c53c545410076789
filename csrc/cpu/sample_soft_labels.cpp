// Kernels of sample_soft_labels: the forward one samples soft labels from the Gaussian over the logits and blends them with
// one-hot labels, the backward one computes the gradients of mu and logvar.
//
// Least memory traffic: two reads and one write forward, three reads and two writes backward. Drawing num_samples * C
// normals for each voxel takes longer than that.
#include "cpu/blend.h"
#include "cpu/gaussian.h"
#include "cpu/kernel.h"
#include "cpu/labels.h"
#include "cpu/tile.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

template <bool kBackward>
struct SampleSoftLabels : TiledForFirstCache<SampleArgs, 3, 1 << 14> {
    // In the forward kernel, `soft` becomes the soft labels. In the backward kernel, it holds the upstream gradient, and mu
    // and logvar become their gradients.
    template <class T>
    static void compute_chunk(const Args& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
        const int64_t C = a.shape.C;
        int32_t* labels = scratch.take<int32_t>(tiles.length);
        GaussianBlock<T> gaussian(scratch, a.spec.sampling, C);
        TensorTile<T> mu(scratch, a.tensors.mu, a.gradients.mu, a.shape, tiles.length);
        TensorTile<T> logvar(scratch, a.tensors.logvar, a.gradients.logvar, a.shape, tiles.length);
        TensorTile<T> soft(scratch, a.grad_output, a.soft_labels, a.shape, tiles.length);
        if (scratch.is_counting()) return;
        const T alpha = a.spec.labels.tensor ? static_cast<T>(a.spec.alpha) : T(1),
                num_samples = static_cast<T>(a.spec.sampling.num_samples);
        for (const auto& [span, next] : TilesOfChunk(tiles, chunk)) {
            const int count = span.count;
            const bool any_ignored = load_labels(labels, a.spec.labels, span, C) < count;
            for (auto* tensor : {&mu, &logvar, &soft}) tensor->begin(span, next);
            if (any_ignored)
                for (auto* tensor : {&mu, &logvar, &soft}) clear_ignored(tensor->tile(), labels, count, C);
            for (int b = 0; b * kLanes < count; ++b) {
                for (auto* tensor : {&mu, &logvar, &soft}) tensor->prefetch_next(b);
                T* soft_block = soft.block(b);
                gaussian.template set<false>(mu.block(b), logvar.block(b), static_cast<uint64_t>(span.n * a.shape.S + span.s + b * kLanes));
                if (kBackward) {
                    gaussian.template add_samples<false, true>(nullptr, soft_block);
                    const F<T> scale = broadcast<F<T>>(alpha / (num_samples * static_cast<T>(a.spec.sampling.temperature)));
                    gaussian.template finish_gradients<false>(scale, zero<T>());
                } else {
                    gaussian.template add_samples<true, false>(soft_block, nullptr);
                    blend_block(labels + b * kLanes, soft_block, C, alpha, T(1) / num_samples);
                }
            }
            for (auto* tensor : {&mu, &logvar, &soft}) tensor->end(span);
        }
    }
};

}  // namespace

const Kernel<SampleArgs> sample_soft_labels = make_kernel<SampleSoftLabels<false>>();
const Kernel<SampleArgs> sample_soft_labels_backward = make_kernel<SampleSoftLabels<true>>();

}  // namespace CALSEG_ISA
}  // namespace calseg
