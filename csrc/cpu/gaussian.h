// Gaussian over the logits of a block of voxels: its KL term, its samples, and the gradients of mu and logvar.
//
// Sample k of class c is nu = mu + sigma * noise with sigma = exp(logvar / 2). The noise is drawn again whenever it is
// needed and never stored for a whole tensor.
#pragma once

#include "cpu/philox.h"
#include "cpu/scratch.h"
#include "cpu/softmax.h"
#include "host/arguments.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

template <class T>
CALSEG_INLINE void clear_block(T* block, int64_t C) {
    for (int64_t c = 0; c < C; ++c) store(block + c * kLanes, zero<T>());
}

// Sums over samples, for one class: of the gradient g of nu, and of g times the noise z.
template <class T>
struct GradientSums {
    F<T> mu, logvar;
    CALSEG_MEMBER void add(F<T> g, F<T> z) {
        mu = mu + g;
        logvar = logvar + g * z;
    }
};

// kClasses is the number of classes if it is known at compile time, else 0.
template <class T, int kClasses = 0>
class GaussianBlock {
 public:
    // Returns the number of normals per sample. The noise contract pads more than two classes to whole quads of random
    // words. With up to two classes, several samples share a quad.
    static int64_t padded_classes(int64_t C) { return C <= 2 ? C : round_up(C, 4); }
    // Returns the number of samples in a group, which are drawn together. A group starts on a whole quad, and the
    // first-level cache holds its rows.
    static int64_t group_size(int64_t C) { return C <= 2 ? 8 / C : C <= 32 ? 4 : 2; }
    static int64_t noise_rows(int64_t C) { return round_up(group_size(C) * padded_classes(C), 4); }

    GaussianBlock(Scratch& scratch, const Sampling& gaussian, int64_t num_classes)
        : grad_mu(scratch.take<T>(num_classes * kLanes)),
          grad_logvar(scratch.take<T>(num_classes * kLanes)),
          C_(num_classes),
          noise_(scratch.take<T>(noise_rows(num_classes) * kLanes)),
          e_(scratch.take<T>(group_size(num_classes) * num_classes * kLanes)),
          per_sum_(scratch.take<T>(group_size(num_classes) * kLanes)),
          dot_(scratch.take<T>(group_size(num_classes) * kLanes)),
          philox_(gaussian.seed),
          num_samples_(gaussian.num_samples),
          temperature_(static_cast<T>(gaussian.temperature)),
          per_temperature_(T(1) / temperature_),
          prior_mu_(static_cast<T>(gaussian.prior_mu)),
          prior_logvar_(static_cast<T>(gaussian.prior_logvar)),
          prior_precision_(static_cast<T>(std::exp(-gaussian.prior_logvar))) {}

    // Begins a block. Turns mu into mu / temperature and logvar into sigma / temperature. Returns the KL term of each voxel
    // if kKL.
    template <bool kKL>
    CALSEG_MEMBER F<T> set(T* mu, T* logvar, uint64_t first_voxel) {
        mean = mu;
        deviation = logvar;
        philox_.set_voxels(first_voxel);
        const F<T> per_temperature = broadcast<F<T>>(per_temperature_), half = broadcast<F<T>>(T(0.5));
        const F<T> prior_mu = broadcast<F<T>>(prior_mu_), prior_logvar = broadcast<F<T>>(prior_logvar_);
        const F<T> precision = broadcast<F<T>>(prior_precision_), one = broadcast<F<T>>(T(1));
        F<T> kl = zero<T>();
        for_classes(C(), [&](auto at_once, int64_t c) {
            constexpr int K = decltype(at_once)::value;
            F<T> sigma[K];
            for (int j = 0; j < K; ++j) sigma[j] = half * load<F<T>>(logvar + (c + j) * kLanes);
            exp_any(sigma);
            for (int j = 0; j < K; ++j) {
                const F<T> m = load<F<T>>(mu + (c + j) * kLanes), lv = load<F<T>>(logvar + (c + j) * kLanes);
                if (kKL) {
                    const F<T> gap = m - prior_mu;
                    kl = kl + ((prior_logvar - lv) + ((sigma[j] * sigma[j] + gap * gap) * precision - one));
                }
                store(mu + (c + j) * kLanes, m * per_temperature);
                store(logvar + (c + j) * kLanes, sigma[j] * per_temperature);
            }
        });
        return half * kl;
    }

    void clear_gradients() {
        clear_block(grad_mu, C());
        clear_block(grad_logvar, C());
    }

    // Draws all samples of the block. If kEstimate, writes the sum over samples of softmax(nu / temperature) to `estimate`.
    //
    // If kGradient, `a` is the gradient of the result with respect to the mean of these softmaxes. Let g be the gradient
    // with respect to nu of one sample, times num_samples * temperature. Writes the sum over samples of g to grad_mu, and
    // that of g times the noise to grad_logvar. finish_gradients() applies the factors that are missing.
    template <bool kEstimate, bool kGradient>
    CALSEG_MEMBER void add_samples(T* estimate, const T* a) {
        for (int64_t first = 0; first < num_samples_; first += group_size(C())) {
            const int64_t count = draw_group(first);
            for (int64_t k = 0; k < count; ++k) {
                F<T> dot = zero<T>();
                const F<T> sum = softmax(k, [&](int64_t c, F<T>, F<T> e) {
                    if (kGradient) dot = dot + load<F<T>>(a + c * kLanes) * e;
                });
                const F<T> per_sum = reciprocal(sum);
                store(per_sum_ + k * kLanes, per_sum);
                store(dot_ + k * kLanes, dot * per_sum * per_sum);
            }
            for (int64_t c = 0; c < C(); ++c) {
                const F<T> slope = kGradient ? load<F<T>>(a + c * kLanes) : zero<T>();
                F<T> total = kEstimate ? previous(estimate, c, first) : zero<T>();
                GradientSums<T> gradient;
                if (kGradient) gradient = {previous(grad_mu, c, first), previous(grad_logvar, c, first)};
                for (int64_t k = 0; k < count; ++k) {
                    const F<T> e = load<F<T>>(e_of(k, c)), per_sum = load<F<T>>(per_sum_ + k * kLanes);
                    if (kEstimate) total = total + e * per_sum;
                    if (kGradient) gradient.add(e * (slope * per_sum - load<F<T>>(dot_ + k * kLanes)), load<F<T>>(noise_of(k, c)));
                }
                if (kEstimate) store(estimate + c * kLanes, total);
                if (kGradient) store_gradient(c, gradient);
            }
        }
    }

    // Draws all samples of the block, and returns the sum over samples of -log softmax(nu)[label]. It needs a temperature of 1.
    // If kGradient, let g be the gradient of that term with respect to nu. Writes the sum over samples of g to grad_mu, and
    // that of g times the noise to grad_logvar.
    template <bool kGradient>
    CALSEG_MEMBER F<T> add_label_samples(I<T> labels) {
        const F<T> none = zero<T>(), one = broadcast<F<T>>(T(1));
        F<T> loss = none;
        for (int64_t first = 0; first < num_samples_; first += group_size(C())) {
            const int64_t count = draw_group(first);
            for (int64_t k = 0; k < count; ++k) {
                F<T> label_d = none;
                const F<T> sum = softmax(k, [&](int64_t c, F<T> d, F<T>) {
                    label_d = select(equal(labels, broadcast<I<T>>(static_cast<int32_t>(c))), d, label_d);
                });
                loss = loss + (log_positive(sum) - label_d);
                if (kGradient) store(per_sum_ + k * kLanes, reciprocal(sum));
            }
            if (!kGradient) continue;
            for (int64_t c = 0; c < C(); ++c) {
                const F<T> hit = select(equal(labels, broadcast<I<T>>(static_cast<int32_t>(c))), one, none);
                GradientSums<T> gradient = {previous(grad_mu, c, first), previous(grad_logvar, c, first)};
                for (int64_t k = 0; k < count; ++k)
                    gradient.add(load<F<T>>(e_of(k, c)) * load<F<T>>(per_sum_ + k * kLanes) - hit, load<F<T>>(noise_of(k, c)));
                store_gradient(c, gradient);
            }
        }
        return loss;
    }

    // Overwrites the block's mean and deviation with the gradients of mu and logvar: the sums in grad_mu and grad_logvar
    // times sample_scale, plus the gradient of the KL term times kl_scale if kKL.
    template <bool kKL>
    CALSEG_MEMBER void finish_gradients(F<T> sample_scale, F<T> kl_scale) {
        const F<T> temperature = broadcast<F<T>>(temperature_), precision = broadcast<F<T>>(prior_precision_);
        const F<T> prior_mu = broadcast<F<T>>(prior_mu_), half = broadcast<F<T>>(T(0.5)), one = broadcast<F<T>>(T(1)), none = zero<T>();
        const auto off = equal(kl_scale, none);  // the gradient of these voxels is exactly 0, even if their variance is infinite
        for (int64_t c = 0; c < C(); ++c) {
            const F<T> sigma = load<F<T>>(deviation + c * kLanes) * temperature;
            F<T> to_mu = load<F<T>>(grad_mu + c * kLanes) * sample_scale;
            F<T> to_logvar = load<F<T>>(grad_logvar + c * kLanes) * (sample_scale * half * sigma);
            if (kKL) {
                const F<T> mu = load<F<T>>(mean + c * kLanes) * temperature;
                to_mu = to_mu + select(off, none, kl_scale * ((mu - prior_mu) * precision));
                to_logvar = to_logvar + select(off, none, kl_scale * (half * (sigma * sigma * precision - one)));
            }
            store(mean + c * kLanes, to_mu);
            store(deviation + c * kLanes, to_logvar);
        }
    }

    T *mean = nullptr, *deviation = nullptr;  // [C][kLanes] the block of the tiles of mu and logvar, which set() changed
    T *grad_mu, *grad_logvar;                 // [C][kLanes] sums over samples

    // ---- steps of a sum over samples, for losses with a sum of their own ----

    CALSEG_MEMBER int64_t C() const { return kClasses ? kClasses : C_; }

    // Draws the noise of the group of samples that begins with sample `first`. Returns the number of samples in the group.
    CALSEG_MEMBER int64_t draw_group(int64_t first) {
        const int64_t Cp = padded_classes(C());
        const int64_t count = smaller(group_size(C()), num_samples_ - first), quads = (count * Cp + 3) / 4;
        int64_t quad = 0;
        for (; quad + 2 <= quads; quad += 2) make_noise<2>(first * Cp / 4, quad);
        if (quad < quads) make_noise<1>(first * Cp / 4, quad);
        return count;
    }

    CALSEG_MEMBER T* e_of(int64_t k, int64_t c) { return e_ + (k * C() + c) * kLanes; }
    CALSEG_MEMBER const T* noise_of(int64_t k, int64_t c) { return noise_ + (k * padded_classes(C()) + c) * kLanes; }

    // Computes e = exp(d) with d = (nu - max) / temperature for sample k of the group, and returns the sum of e over classes.
    // Calls visit(c, d, e) for every class.
    template <class Visit>
    CALSEG_MEMBER F<T> softmax(int64_t k, const Visit& visit) {
        F<T> top = broadcast<F<T>>(T(-INFINITY));
        for (int64_t c = 0; c < C(); ++c) {
            const F<T> scaled = load<F<T>>(mean + c * kLanes) + load<F<T>>(deviation + c * kLanes) * load<F<T>>(noise_of(k, c));
            top = larger(scaled, top);
            store(e_of(k, c), scaled);
        }
        F<T> sum = zero<T>();
        for_classes(C(), [&](auto at_once, int64_t c) {
            constexpr int K = decltype(at_once)::value;
            F<T> d[K], e[K];
            for (int j = 0; j < K; ++j) e[j] = d[j] = load<F<T>>(e_of(k, c + j)) - top;
            exp_nonpositive(e);
            sum = sum + sum_of(e);
            for (int j = 0; j < K; ++j) {
                visit(c + j, d[j], e[j]);
                store(e_of(k, c + j), e[j]);
            }
        });
        return sum;
    }

    // Returns the sum over the groups of samples before sample `first`.
    CALSEG_MEMBER F<T> previous(const T* sums, int64_t c, int64_t first) { return first == 0 ? zero<T>() : load<F<T>>(sums + c * kLanes); }

    CALSEG_MEMBER void store_gradient(int64_t c, const GradientSums<T>& sums) {
        store(grad_mu + c * kLanes, sums.mu);
        store(grad_logvar + c * kLanes, sums.logvar);
    }

 private:
    // Draws the noise of K quads. `first` is the first quad of the group. `quad` counts from there.
    template <int K>
    CALSEG_MEMBER void make_noise(int64_t first, int64_t quad) {
        alignas(64) uint32_t words[K][4][kLanes];
        philox_.template words<K>(static_cast<uint32_t>(first + quad), words);
        T* const to = noise_ + 4 * quad * kLanes;
        // A quad has two pairs of normals. If the last quad of a sample holds only one or two classes, its second pair is
        // not needed.
        const int64_t classes = C(), per_sample = padded_classes(classes) / 4, until_last = per_sample - 1 - quad % larger(per_sample, 1);
        const bool half_wanted = classes > 2 && (classes % 4 == 1 || classes % 4 == 2);
        if (half_wanted && until_last < K) make_pairs<2 * K - 1>(words, to, static_cast<int>(2 * until_last + 1));
        else make_pairs<2 * K>(words, to, 2 * K);
    }

    // Makes N pairs of normals from the words of K quads. Pair number `skip` is left out.
    template <int N, int K>
    CALSEG_MEMBER void make_pairs(const uint32_t (&words)[K][4][kLanes], T* to, int skip) {
        const uint32_t *a[N], *b[N];
        F<T> z0[N], z1[N];
        for (int i = 0; i < N; ++i) {
            const int pair = i + (i >= skip);
            a[i] = words[pair / 2][2 * (pair % 2)];
            b[i] = words[pair / 2][2 * (pair % 2) + 1];
        }
        box_muller(a, b, z0, z1);
        for (int i = 0; i < N; ++i) {
            const int pair = i + (i >= skip);
            store(to + 2 * pair * kLanes, z0[i]);
            store(to + (2 * pair + 1) * kLanes, z1[i]);
        }
    }

    int64_t C_;
    T* noise_;    // [group_size][padded_classes][kLanes] noise of the samples of a group
    T* e_;        // [group_size][C][kLanes] exponentials of the samples of a group
    T* per_sum_;  // [group_size][kLanes] 1 / sum over classes of e
    T* dot_;      // [group_size][kLanes] (sum over classes of a * e) / (sum of e)^2
    Philox philox_;
    int64_t num_samples_;
    T temperature_, per_temperature_, prior_mu_, prior_logvar_, prior_precision_;
};

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
