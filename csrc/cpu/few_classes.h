// Cross-entropy with one-hot labels of two to four classes, and its gradient, without class weights and label smoothing.
//
// With so few classes, registers hold all numbers of a block. So logits are read from the tensor and gradients are written
// to the tensor without a tile in between. Nothing is prefetched, because the processor's own prefetcher can follow that
// many rows.
#pragma once

#include "cpu/loss_tile.h"
#include "cpu/vector_math.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Computation of one tile. D is the type in which logits and gradient are stored. T is the compute type.
template <int C, bool kGradient, class D, class T>
class FewClasses {
 public:
    // Returns whether these tensors are supported: the voxels are contiguous, the dtypes are equal, and the rows of the
    // gradient are aligned if it is to be streamed.
    static bool can_compute(const TensorView& logits, const TensorView& gradient, bool stream) {
        if (logits.stride_s != 1 || (kGradient && (gradient.stride_s != 1 || gradient.dtype != logits.dtype))) return false;
        if (!kGradient || !stream) return true;
        const bool aligned =
            reinterpret_cast<uintptr_t>(gradient.data) % 64 == 0 && gradient.stride_c % kLine == 0 && gradient.stride_n % kLine == 0;
        return kStreamed<D> && aligned;
    }

    FewClasses(const TensorView& logits, const TensorView& gradient, const LossTile<T>& t, const Span& span, bool stream)
        : labels_(t.labels), labels_ahead_(t.labels_ahead), upstream_(t.upstream), loss_(t.loss), stream_(stream) {
        for (int c = 0; c < C; ++c) {
            logits_[c] = address<D>(logits, span, c);
            gradients_[c] = kGradient ? address<D>(gradient, span, c) : nullptr;
        }
    }

    // Computes the losses and gradients of the first `count` voxels. kIgnored says that some of them may be ignored.
    template <bool kIgnored>
    CALSEG_MEMBER void compute(int count) const {
        const FewClasses self = *this;  // a copy, as the members of a referenced object would be read again after every store
        const int whole = count / kLine * kLine;
        Block block;
        if (whole > 0) self.template begin<kIgnored>(0, kLanes, block);
        int at = 0;
        for (; at + kLine < whole; at += kLine) self.template line<kIgnored, true>(at, block);
        for (; at < whole; at += kLine) self.template line<kIgnored, false>(at, block);
        for (; at < count; at += kLanes) {
            const int rest = static_cast<int>(smaller(count - at, kLanes));
            alignas(64) T gradient[C][kLine];
            self.template begin<true>(at, rest, block);
            self.template finish<true>(at, block, gradient, 0);
            if (kGradient)
                for (int c = 0; c < C; ++c)
                    for (int i = 0; i < rest; ++i) narrow(gradients_[c][at + i], gradient[c][i]);
        }
    }

 private:
    // Number of voxels whose gradients are written at once. They fill whole cache lines, because streaming half a line
    // costs as much as streaming a whole one.
    static constexpr int kLine = kLanes * sizeof(D) < 64 ? 64 / sizeof(D) : kLanes;

    // State of a block between begin() and finish(). The two functions together are a chain of operations that is longer
    // than a processor looks ahead. So the code begins the next block before it finishes the current one, and the two
    // overlap.
    struct Block {
        F<T> e[C], sum, label_d;
        I<T> labels;

        // Copies member by member. The compiler copies a whole structure through memory.
        CALSEG_MEMBER void become(const Block& other) {
            for (int c = 0; c < C; ++c) e[c] = other.e[c];
            sum = other.sum;
            label_d = other.label_d;
            labels = other.labels;
        }
    };

    // Computes the voxels of one line, whose first block has been begun. If kMore, it also begins the first block of the
    // next line.
    template <bool kIgnored, bool kMore>
    CALSEG_MEMBER void line(int from, Block& block) const {
        alignas(64) T gradient[C][kLine];
        for (int within = 0; within < kLine; within += kLanes) {
            const int at = from + within;
            const bool more = kMore || within + kLanes < kLine;
            Block next;
            if (more) begin<kIgnored>(at + kLanes, kLanes, next);
            finish<kIgnored>(at, block, gradient, within);
            if (more) block.become(next);
        }
        if (kGradient)
            for (int c = 0; c < C; ++c) write(gradients_[c] + from, gradient[c]);
    }

    // Computes the exponentials of a block of `count` voxels, and their sum.
    template <bool kIgnored>
    CALSEG_MEMBER void begin(int at, int count, Block& block) const {
        labels_ahead_.prefetch(at / kLanes);
        block.labels = load<I<T>>(labels_ + at);
        F<T>(&x)[C] = block.e, top = zero<T>();
        for (int c = 0; c < C; ++c) {
            x[c] = load_widened<T>(logits_[c] + at, count);
            if (kIgnored) x[c] = select(less(block.labels, broadcast<I<T>>(0)), zero<T>(), x[c]);
            top = c == 0 ? x[0] : larger(x[c], top);
        }
        for (int c = 0; c < C; ++c) {
            x[c] = x[c] - top;
            block.label_d = c == 0 ? x[0] : select(equal(block.labels, broadcast<I<T>>(c)), x[c], block.label_d);
        }
        exponentials(x);
        block.sum = x[0];
        for (int c = 1; c < C; ++c) block.sum = block.sum + x[c];
    }

    // Computes the losses of a block, and its gradients, which it writes to place `within` of the line.
    template <bool kIgnored>
    CALSEG_MEMBER void finish(int at, const Block& block, T (&gradient)[C][kLine], int within) const {
        const F<T> loss = log_positive(block.sum) - block.label_d;
        store(loss_ + at, kIgnored ? select(less(block.labels, broadcast<I<T>>(0)), zero<T>(), loss) : loss);
        if (!kGradient) return;
        const F<T> upstream = load<F<T>>(upstream_ + at), scale = upstream * reciprocal(block.sum);
        for (int c = 0; c < C; ++c)
            store(gradient[c] + within,
                  multiply_subtract(block.e[c], scale, select(equal(block.labels, broadcast<I<T>>(c)), upstream, zero<T>())));
    }

    // Turns differences from the maximum into exponentials. Two classes need only one exponential: one difference is 0, so
    // the sum of the two is the other one.
    static CALSEG_MEMBER void exponentials(F<T> (&d)[C]) {
        if constexpr (C != 2) return exp_nonpositive(d);
        F<T> e[1] = {d[0] + d[1]};
        exp_nonpositive(e);
        for (F<T>& each : d) each = select(equal(each, zero<T>()), broadcast<F<T>>(T(1)), e[0]);
    }

    // Writes a line of gradients.
    CALSEG_MEMBER void write(D* to, const T (&line)[kLine]) const {
        if (!kStreamed<D> || !stream_) return narrow_line(to, line);
        alignas(64) D narrowed[kLine];
        narrow_line(narrowed, line);
        for (int i = 0; i < kLine; i += 64 / static_cast<int>(sizeof(D))) stream_line(to + i, narrowed + i);
    }

    const D* logits_[C];
    D* gradients_[C];
    const int32_t* labels_;
    LabelsAhead labels_ahead_;
    const T* upstream_;
    T* loss_;
    bool stream_;
};

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
