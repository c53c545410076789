// Cross-entropy with one-hot labels of two to four classes, the overlap, and their gradient, without class weights and label
// smoothing.
//
// With so few classes, registers hold all numbers of a block. So logits are read from the tensor and gradients are written
// to the tensor without a tile in between. Nothing is prefetched, because the processor's own prefetcher can follow that
// many rows.
#pragma once

#include "cpu/loss_tile.h"
#include "cpu/overlap.h"
#include "cpu/vector_math.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Results of a pass over the logits: the losses, the losses with their gradient or with the sums of the overlap, or the
// gradient of losses and overlap.
enum class Wanted { loss, gradient, overlap, gradient_with_overlap };

// Computation of one tile. D is the type in which logits and gradient are stored. T is the compute type.
template <int C, Wanted kWanted, class D, class T>
class FewClasses {
    static constexpr bool kGradient = kWanted == Wanted::gradient || kWanted == Wanted::gradient_with_overlap;

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

    FewClasses(const TensorView& logits, const TensorView& gradient, const LossTile<T>& t, const OverlapSlopes<T>& slopes, const Span& span,
               bool stream)
        : labels_(t.labels), labels_ahead_(t.labels_ahead), upstream_(t.upstream), loss_(t.loss), slopes_(slopes), stream_(stream) {
        for (int c = 0; c < C; ++c) {
            logits_[c] = address<D>(logits, span, c);
            gradients_[c] = kGradient ? address<D>(gradient, span, c) : nullptr;
        }
    }

    // Computes what is wanted of the first `count` voxels. kIgnored says that some of them may be ignored.
    template <bool kIgnored>
    CALSEG_MEMBER void compute(int count, OverlapSums<T>& overlap) const {
        const FewClasses self = *this;  // a copy, as the members of a referenced object would be read again after every store
        const int whole = count / kLine * kLine;
        Block block;
        Sums sums;
        for (int c = 0; c < C; ++c) {
            sums.p[c] = sums.of_label[c] = zero<T>();
            sums.hits[c] = 0;
        }
        if (whole > 0) self.template begin<kIgnored>(0, kLanes, block);
        int at = 0;
        for (; at + kLine < whole; at += kLine) self.template line<kIgnored, true>(at, block, sums);
        for (; at < whole; at += kLine) self.template line<kIgnored, false>(at, block, sums);
        for (; at < count; at += kLanes) {
            const int rest = static_cast<int>(smaller(count - at, kLanes));
            alignas(64) T gradient[C][kLine];
            self.template begin<true>(at, rest, block);
            self.template finish<true>(at, block, gradient, 0, sums);
            if (kGradient)
                for (int c = 0; c < C; ++c)
                    for (int i = 0; i < rest; ++i) narrow(gradients_[c][at + i], gradient[c][i]);
        }
        if (kWanted == Wanted::overlap)
            for (int c = 0; c < C; ++c) overlap.add_hard_sums(c, sums.p[c], sums.of_label[c], sums.hits[c]);
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

    // Sums of the overlap over the blocks of a tile.
    struct Sums {
        F<T> p[C], of_label[C];
        int hits[C];
    };

    // Computes the voxels of one line, whose first block has been begun. If kMore, it also begins the first block of the
    // next line.
    template <bool kIgnored, bool kMore>
    CALSEG_MEMBER void line(int from, Block& block, Sums& sums) const {
        alignas(64) T gradient[C][kLine];
        for (int within = 0; within < kLine; within += kLanes) {
            const int at = from + within;
            const bool more = kMore || within + kLanes < kLine;
            Block next;
            if (more) begin<kIgnored>(at + kLanes, kLanes, next);
            finish<kIgnored>(at, block, gradient, within, sums);
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

    // Computes what is wanted of a block. Gradients are written to place `within` of the line.
    template <bool kIgnored>
    CALSEG_MEMBER void finish(int at, const Block& block, T (&gradient)[C][kLine], int within, Sums& sums) const {
        const F<T> none = zero<T>();
        const auto ignored = less(block.labels, broadcast<I<T>>(0));
        const auto hit = [&](int c) { return equal(block.labels, broadcast<I<T>>(c)); };
        if (kWanted != Wanted::gradient_with_overlap) {
            const F<T> loss = log_positive(block.sum) - block.label_d;
            store(loss_ + at, kIgnored ? select(ignored, none, loss) : loss);
        }
        const F<T> upstream = load<F<T>>(upstream_ + at),
                   per_sum = kIgnored ? select(ignored, none, reciprocal(block.sum)) : reciprocal(block.sum);
        if constexpr (kWanted == Wanted::gradient) {
            const F<T> scale = upstream * reciprocal(block.sum);
            for (int c = 0; c < C; ++c) store(gradient[c] + within, multiply_subtract(block.e[c], scale, select(hit(c), upstream, none)));
        } else if constexpr (kWanted == Wanted::overlap) {
            for (int c = 0; c < C; ++c) {
                const F<T> p = block.e[c] * per_sum;
                sums.p[c] = sums.p[c] + p;
                sums.of_label[c] = sums.of_label[c] + select(hit(c), p, none);
                sums.hits[c] += count_of(hit(c));
            }
        } else if constexpr (kWanted == Wanted::gradient_with_overlap) {
            F<T> q[C], p[C], base = upstream;
            for (int c = 0; c < C; ++c) {
                q[c] = select(hit(c), broadcast<F<T>>(slopes_.below[c]), broadcast<F<T>>(slopes_.above[c]));
                p[c] = block.e[c] * per_sum;
                base = base - q[c] * p[c];
            }
            for (int c = 0; c < C; ++c) store(gradient[c] + within, multiply_subtract(p[c], base + q[c], select(hit(c), upstream, none)));
        }
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
    OverlapSlopes<T> slopes_;
    bool stream_;
};

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
