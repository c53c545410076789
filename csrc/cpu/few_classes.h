// Cross-entropy of two to four classes with one-hot or soft labels, the overlap, and the gradient of the logits, without
// class weights and label smoothing.
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

// Computation of one tile. D is the type in which logits, soft labels and gradient are stored. T is the compute type.
template <int C, Wanted kWanted, bool kSoft, class D, class T>
class FewClasses {
    static constexpr bool kGradient = kWanted == Wanted::gradient || kWanted == Wanted::gradient_with_overlap;

 public:
    // Returns whether the tensors of a call are supported: the voxels are contiguous, the dtypes are equal, and the rows of
    // the gradient are aligned if it is to be streamed.
    static bool can_compute(const LossArgs& a, bool stream) {
        const TensorView &logits = a.tensors.logits, &soft = a.tensors.soft_labels, &gradient = a.gradients.logits;
        const auto readable = [&](const TensorView& tensor) { return tensor.stride_s == 1 && tensor.dtype == logits.dtype; };
        if (!readable(logits) || (kSoft && !readable(soft)) || (kGradient && !readable(gradient))) return false;
        if (!kGradient || !stream) return true;
        const bool aligned =
            reinterpret_cast<uintptr_t>(gradient.data) % 64 == 0 && gradient.stride_c % kLine == 0 && gradient.stride_n % kLine == 0;
        return kStreamed<D> && aligned;
    }

    FewClasses(const LossArgs& a, const LossTile<T>& t, const OverlapSlopes<T>& slopes, const Span& span, bool stream)
        : labels_(t.labels), labels_ahead_(t.labels_ahead), upstream_(t.upstream), loss_(t.loss), slopes_(slopes), stream_(stream) {
        for (int c = 0; c < C; ++c) {
            logits_[c] = address<D>(a.tensors.logits, span, c);
            soft_[c] = kSoft ? address<D>(a.tensors.soft_labels, span, c) : nullptr;
            gradients_[c] = kGradient ? address<D>(a.gradients.logits, span, c) : nullptr;
        }
    }

    // Computes what is wanted of the first `count` voxels. kIgnored says that some of them may be ignored.
    template <bool kIgnored>
    void compute(int count, OverlapSums<T>& overlap) const {
        const int whole = count / kLine * kLine;
        if (whole > 0) lines<kIgnored>(whole, overlap);
        if (whole < count) rest(whole, count - whole, overlap);
    }

 private:
    // Number of voxels whose gradients are written at once. They fill whole cache lines, because streaming half a line
    // costs as much as streaming a whole one.
    static constexpr int kLine = kLanes * sizeof(D) < 64 ? 64 / sizeof(D) : kLanes;

    // State of a block between begin() and finish(). The two functions together are a chain of operations that is longer
    // than a processor looks ahead. So the code begins the next block before it finishes the current one, and the two
    // overlap.
    struct Block {
        F<T> e[C], sum;
        F<T> label_d;     // sum over classes of Y * (logit - max)
        F<T> label_mass;  // soft labels only: sum of Y
        I<T> labels;

        // Copies member by member. The compiler copies a whole structure through memory.
        CALSEG_MEMBER void become(const Block& other) {
            for (int c = 0; c < C; ++c) e[c] = other.e[c];
            sum = other.sum;
            label_d = other.label_d;
            if (kSoft) label_mass = other.label_mass;
            labels = other.labels;
        }
    };

    // Sums of the overlap over the blocks of a tile: those of p + Y and |p - Y| for soft labels, else the three that
    // OverlapSums::add_hard_sums() takes.
    struct Sums {
        F<T> mass[C], other[C];
        int hits[C];
    };

    // Computes the first `count` voxels, a multiple of kLine.
    template <bool kIgnored>
    CALSEG_ONCE void lines(int count, OverlapSums<T>& overlap) const {
        const FewClasses self = *this;  // a copy, as the members of a referenced object would be read again after every store
        Block block;
        Sums sums;
        for (int c = 0; c < C; ++c) {
            sums.mass[c] = sums.other[c] = zero<T>();
            sums.hits[c] = 0;
        }
        self.template begin<kIgnored>(0, block);
        for (int at = 0, next; at < count; at = next) {
            next = at + kLine;
            self.template line<kIgnored>(at, next < count ? next : at, block, sums);
        }
        for (int c = 0; kWanted == Wanted::overlap && c < C; ++c)
            if (kSoft) overlap.add_sums(c, sums.mass[c], sums.other[c]);
            else overlap.add_hard_sums(c, sums.mass[c], sums.other[c], sums.hits[c]);
    }

    // Computes the last `count` voxels, fewer than a line: in copies, which ignored voxels fill up to a line.
    CALSEG_ONCE void rest(int from, int count, OverlapSums<T>& overlap) const {
        alignas(64) D logits[C][kLine] = {}, soft[C][kLine] = {}, gradient[C][kLine] = {};
        alignas(64) T upstream[kLine] = {}, loss[kLine] = {};
        alignas(64) int32_t labels[kLine];
        const size_t bytes = count * sizeof(D);
        FewClasses line = *this;
        for (int c = 0; c < C; ++c) {
            std::memcpy(logits[c], logits_[c] + from, bytes);
            if (kSoft) std::memcpy(soft[c], soft_[c] + from, bytes);
            line.logits_[c] = logits[c];
            line.soft_[c] = soft[c];
            line.gradients_[c] = gradient[c];
        }
        for (int i = 0; i < kLine; ++i) labels[i] = i < count ? labels_[from + i] : -1;
        for (int i = 0; i < count; ++i) upstream[i] = upstream_[from + i];
        line.labels_ = labels;
        line.labels_ahead_ = LabelsAhead();
        line.upstream_ = upstream;
        line.loss_ = loss;
        line.stream_ = false;
        line.template lines<true>(kLine, overlap);
        for (int c = 0; kGradient && c < C; ++c) std::memcpy(gradients_[c] + from, gradient[c], bytes);
        for (int i = 0; kWanted != Wanted::gradient_with_overlap && i < count; ++i) loss_[from + i] = loss[i];
    }

    // Computes the voxels of one line, whose first block has been begun, and begins the first block of the line at `next`.
    // After the last line that is a line for nothing, which takes less time than the compiler would for a loop without.
    template <bool kIgnored>
    CALSEG_MEMBER void line(int from, int next, Block& block, Sums& sums) const {
        alignas(64) T gradient[C][kLine];
        for (int within = 0; within < kLine; within += 2 * kLanes) {
            step<kIgnored>(from, within, next, block, gradient, sums);
            if (kLine > kLanes) step<kIgnored>(from, within + kLanes, next, block, gradient, sums);
        }
        if (kGradient)
            for (int c = 0; c < C; ++c) write(gradients_[c] + from, gradient[c]);
    }

    // Computes the block at place `within` of the line, which has been begun, and begins the block after it.
    template <bool kIgnored>
    CALSEG_MEMBER void step(int from, int within, int next, Block& block, T (&gradient)[C][kLine], Sums& sums) const {
        Block begun;
        begin<kIgnored>(within + kLanes < kLine ? from + within + kLanes : next, begun);
        finish<kIgnored>(from + within, block, gradient, within, sums);
        block.become(begun);
    }

    // Computes the exponentials of a block, and their sum.
    template <bool kIgnored>
    CALSEG_MEMBER void begin(int at, Block& block) const {
        labels_ahead_.prefetch(at / kLanes);
        block.labels = load<I<T>>(labels_ + at);
        F<T>(&x)[C] = block.e, top = zero<T>();
        for (int c = 0; c < C; ++c) {
            x[c] = load_widened<T>(logits_[c] + at, kLanes);
            if (kIgnored) x[c] = select(less(block.labels, broadcast<I<T>>(0)), zero<T>(), x[c]);
            top = c == 0 ? x[0] : larger(x[c], top);
        }
        for (int c = 0; c < C; ++c) {
            x[c] = x[c] - top;
            if constexpr (!kSoft) block.label_d = c == 0 ? x[0] : select(equal(block.labels, broadcast<I<T>>(c)), x[c], block.label_d);
        }
        if constexpr (kSoft) {
            block.label_mass = block.label_d = zero<T>();
            for (int c = 0; c < C; ++c) {
                const F<T> y = soft_label<kIgnored>(c, at, block.labels);
                block.label_mass = block.label_mass + y;
                // Where Y is 0, so is the product, even if the logit is -inf.
                block.label_d = block.label_d + select(equal(y, zero<T>()), y, y * x[c]);
            }
        }
        exponentials(x);
        block.sum = x[0];
        for (int c = 1; c < C; ++c) block.sum = block.sum + x[c];
    }

    // Loads the soft labels of class c.
    template <bool kIgnored>
    CALSEG_MEMBER F<T> soft_label(int c, int at, I<T> labels) const {
        const F<T> y = load_widened<T>(soft_[c] + at, kLanes);
        return kIgnored ? select(less(labels, broadcast<I<T>>(0)), zero<T>(), y) : y;
    }

    // Computes what is wanted of a block. Gradients are written to place `within` of the line.
    template <bool kIgnored>
    CALSEG_MEMBER void finish(int at, const Block& block, T (&gradient)[C][kLine], int within, Sums& sums) const {
        const F<T> none = zero<T>();
        const auto ignored = less(block.labels, broadcast<I<T>>(0));
        const auto hit = [&](int c) { return equal(block.labels, broadcast<I<T>>(c)); };
        const auto soft = [&](int c) { return soft_label<kIgnored>(c, at, block.labels); };
        if (kWanted != Wanted::gradient_with_overlap) {
            const F<T> log_sum = log_positive(block.sum), loss = (kSoft ? block.label_mass * log_sum : log_sum) - block.label_d;
            store(loss_ + at, kIgnored ? select(ignored, none, loss) : loss);
        }
        const F<T> upstream = load<F<T>>(upstream_ + at), mass = kSoft ? upstream * block.label_mass : upstream,
                   per_sum = kIgnored ? select(ignored, none, reciprocal(block.sum)) : reciprocal(block.sum);
        // Returns what the gradient of the loss subtracts in class c.
        const auto pull = [&](int c) { return kSoft ? upstream * soft(c) : select(hit(c), upstream, none); };
        if constexpr (kWanted == Wanted::gradient) {
            const F<T> scale = mass * reciprocal(block.sum);
            for (int c = 0; c < C; ++c) store(gradient[c] + within, multiply_subtract(block.e[c], scale, pull(c)));
        } else if constexpr (kWanted == Wanted::overlap && kSoft) {
            for (int c = 0; c < C; ++c) {
                const F<T> p = block.e[c] * per_sum, y = soft(c);
                sums.mass[c] = sums.mass[c] + (p + y);
                sums.other[c] = sums.other[c] + magnitude(p - y);
            }
        } else if constexpr (kWanted == Wanted::overlap) {
            for (int c = 0; c < C; ++c) {
                const F<T> p = block.e[c] * per_sum;
                sums.mass[c] = sums.mass[c] + p;
                sums.other[c] = sums.other[c] + select(hit(c), p, none);
                sums.hits[c] += count_of(hit(c));
            }
        } else if constexpr (kWanted == Wanted::gradient_with_overlap) {
            F<T> q[C], p[C], base = mass;
            for (int c = 0; c < C; ++c) {
                p[c] = block.e[c] * per_sum;
                if constexpr (kSoft) q[c] = slopes_.of(c, p[c], soft(c));
                else q[c] = select(hit(c), broadcast<F<T>>(slopes_.below[c]), broadcast<F<T>>(slopes_.above[c]));
                base = base - q[c] * p[c];
            }
            for (int c = 0; c < C; ++c) store(gradient[c] + within, multiply_subtract(p[c], base + q[c], pull(c)));
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

    const D *logits_[C], *soft_[C];
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
