// Kernels of accumulate_softmax: the forward one adds softmax(logits / temperature) to a running total, the backward one
// computes the gradient of the logits.
//
// Least memory traffic of both: two reads and one write of a tensor of the logits' size.
#include "cpu/kernel.h"
#include "cpu/softmax.h"
#include "cpu/tile.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

template <bool kBackward>
struct AccumulateSoftmax : TiledForFirstCache<AccumulateArgs, 2, 1 << 15> {
    // In the forward kernel, `other` is the running total, to which the softmax is added. In the backward kernel, it is the
    // upstream gradient, which becomes the gradient of the logits.
    template <class T>
    static void compute_chunk(const Args& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
        const int64_t C = a.shape.C;
        const TensorView &in = kBackward ? a.grad_output : a.total, &out = kBackward ? a.grad_logits : a.total;
        TensorTile<T> logits(scratch, a.logits, TensorView(), a.shape, tiles.length);
        TensorTile<T> other(scratch, in, out, a.shape, tiles.length);
        if (scratch.is_counting()) return;
        const F<T> per_temperature = broadcast<F<T>>(T(1) / static_cast<T>(a.spec.temperature)), one = broadcast<F<T>>(T(1));
        for (const auto& [span, next] : TilesOfChunk(tiles, chunk)) {
            for (auto* tensor : {&logits, &other}) tensor->begin(span, next);
            for (int b = 0; b * kLanes < span.count; ++b) {
                for (auto* tensor : {&logits, &other}) tensor->prefetch_next(b);
                T *x = logits.block(b), *o = other.block(b);
                const F<T> top = max_over_classes(x, C);
                F<T> sum = zero<T>(), dot = sum;
                for_classes(C, [&](auto at_once, int64_t c) {
                    constexpr int K = decltype(at_once)::value;
                    F<T> e[K];
                    for (int j = 0; j < K; ++j) e[j] = (load<F<T>>(x + (c + j) * kLanes) - top) * per_temperature;
                    exp_nonpositive(e);
                    for (int j = 0; j < K; ++j) {
                        sum = sum + e[j];
                        if (kBackward) dot = dot + e[j] * load<F<T>>(o + (c + j) * kLanes);
                        store(x + (c + j) * kLanes, e[j]);
                    }
                });
                const F<T> per_sum = one / sum;
                for (int64_t c = 0; c < C; ++c) {
                    const F<T> p = load<F<T>>(x + c * kLanes) * per_sum, y = load<F<T>>(o + c * kLanes);
                    store(o + c * kLanes, kBackward ? p * per_temperature * (y - dot * per_sum) : y + p);
                }
            }
            other.end(span);
        }
    }
};

}  // namespace

const Kernel<AccumulateArgs> accumulate_softmax = make_kernel<AccumulateSoftmax<false>>();
const Kernel<AccumulateArgs> accumulate_softmax_backward = make_kernel<AccumulateSoftmax<true>>();

}  // namespace CALSEG_ISA
}  // namespace calseg
