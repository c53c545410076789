// Kernel of blend_soft_labels: divides the total of several softmax maps by their number, and blends it with one-hot
// labels.
//
// Least memory traffic: one read and one write of the total.
#include "cpu/blend.h"
#include "cpu/kernel.h"
#include "cpu/labels.h"
#include "cpu/tile.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

struct BlendSoftLabels : TiledForFirstCache<BlendArgs, 1, 1 << 16> {
    template <class T>
    static void compute_chunk(const Args& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
        const int64_t C = a.shape.C;
        int32_t* labels = scratch.take<int32_t>(tiles.length);
        TensorTile<T> tensor(scratch, a.estimate, a.estimate, a.shape, tiles.length);
        if (scratch.is_counting()) return;
        const T alpha = a.spec.labels.tensor ? static_cast<T>(a.spec.alpha) : T(1);
        const T scale = static_cast<T>(1.0 / static_cast<double>(a.spec.num_maps));
        for (const auto& [span, next] : TilesOfChunk(tiles, chunk)) {
            load_labels(labels, a.spec.labels, span, C);
            tensor.begin(span, next);
            for (int b = 0; b * kLanes < span.count; ++b) {
                tensor.prefetch_next(b);
                blend_block(labels + b * kLanes, tensor.block(b), C, alpha, scale);
            }
            tensor.end(span);
        }
    }
};

}  // namespace

const Kernel<BlendArgs> blend_soft_labels = make_kernel<BlendSoftLabels>();

}  // namespace CALSEG_ISA
}  // namespace calseg
