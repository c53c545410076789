// Cross-entropy on one-hot labels of two to four classes, without weights or smoothing: what there is of a voxel fits the
// registers, so logits come from memory and gradients go to memory without a tile between. There are no more rows than
// the hardware's prefetcher follows by itself.
#pragma once

#include "cpu/cross_entropy.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

constexpr int kFewClasses = 4;

template <class D>
const D* row_of(const TensorView& view, const Span& span, int64_t c) {
    return static_cast<const D*>(view.data) + span.n * view.stride_n + c * view.stride_c + span.s;
}

// D: how logits and gradient are stored.
template <int C, bool kGradient, class D, class T>
class FewClasses {
 public:
    // Whether it is made for this call: rows in memory, which the streaming stores, if any, can reach.
    static bool takes(const CrossEntropyArgs& a, bool stream) {
        const TensorView& g = a.grad_logits;
        if (a.logits.stride_s != 1 || (kGradient && (g.stride_s != 1 || g.dtype != a.logits.dtype))) return false;
        if (!kGradient || !stream) return true;
        const bool aligned = reinterpret_cast<uintptr_t>(g.data) % 64 == 0 && g.stride_c % kLine == 0 && g.stride_n % kLine == 0;
        return kStreamed<D> && aligned;
    }

    FewClasses(const CrossEntropyArgs& a, const LossTile<T>& t, const Span& span, bool stream)
        : labels_(t.labels), labels_ahead_(t.labels_ahead), upstream_(t.upstream), loss_(t.loss), stream_(stream) {
        for (int c = 0; c < C; ++c) {
            logits_[c] = row_of<D>(a.logits, span, c);
            gradients_[c] = kGradient ? const_cast<D*>(row_of<D>(a.grad_logits, span, c)) : nullptr;
        }
    }

    template <bool kIgnored>
    CALSEG_MEMBER void run(int count) const {
        const FewClasses self = *this;  // a copy: what lies behind a reference is read anew after every store
        int at = 0;
        alignas(64) D gradient[C][kLine];
        for (; at + kLine <= count; at += kLine) {
            for (int within = 0; within < kLine; within += kLanes) {
                self.labels_ahead_.block((at + within) / kLanes);
                self.template block<kIgnored>(at, within, kLanes, gradient);
            }
            if (kGradient)
                for (int c = 0; c < C; ++c) self.write(gradients_[c] + at, gradient[c]);
        }
        for (; at < count; at += kLanes) {
            const int rest = static_cast<int>(smaller(count - at, kLanes));
            self.template block<true>(at, 0, rest, gradient);
            if (kGradient)
                for (int c = 0; c < C; ++c) std::memcpy(gradients_[c] + at, gradient[c], static_cast<size_t>(rest) * sizeof(D));
        }
    }

 private:
    // a group of voxels fills cache lines: to stream half of one costs as much as a whole
    static constexpr int kLine = kLanes * sizeof(D) < 64 ? 64 / sizeof(D) : kLanes;

    CALSEG_MEMBER void write(D* to, const D (&line)[kLine]) const {
        if (!kStreamed<D> || !stream_) return void(std::memcpy(to, line, sizeof line));
        for (int i = 0; i < kLine; i += kLanes) stream_lanes(to + i, line + i);
    }

    template <bool kIgnored>
    CALSEG_MEMBER void block(int from, int within, int count, D (&gradient)[C][kLine]) const {
        const int at = from + within;
        const F<T> none = zero<T>();
        const I<T> labels = load<I<T>>(labels_ + at);
        const auto ignored = less(labels, broadcast<I<T>>(0));
        F<T> x[C], top = none;
        for (int c = 0; c < C; ++c) {
            alignas(64) T lanes[kLanes];
            if (count == kLanes) widen_lanes(lanes, logits_[c] + at);
            else
                for (int i = 0; i < kLanes; ++i) lanes[i] = i < count ? static_cast<T>(widened(logits_[c][at + i])) : T(0);
            x[c] = load<F<T>>(lanes);
            if (kIgnored) x[c] = select(ignored, none, x[c]);
            top = c == 0 ? x[0] : larger(x[c], top);
        }
        F<T> label_d = none, sum = none;
        for (int c = 0; c < C; ++c) {
            x[c] = x[c] - top;
            label_d = c == 0 ? x[0] : select(equal(labels, broadcast<I<T>>(c)), x[c], label_d);
        }
        exp_nonpositive(x);
        for (int c = 0; c < C; ++c) sum = c == 0 ? x[0] : sum + x[c];
        const F<T> loss = log_positive(sum) - label_d;
        store(loss_ + at, kIgnored ? select(ignored, none, loss) : loss);
        if (!kGradient) return;
        const F<T> upstream = load<F<T>>(upstream_ + at), scale = upstream * reciprocal(sum);
        for (int c = 0; c < C; ++c) {
            alignas(64) T lanes[kLanes];
            store(lanes, x[c] * scale - select(equal(labels, broadcast<I<T>>(c)), upstream, none));
            narrow_lanes(gradient[c] + within, lanes);
        }
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
