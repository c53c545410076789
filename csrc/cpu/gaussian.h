// Gaussian over the logits of a block of voxels: its KL term, its noise, and the softmax of its samples.
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

// Sums over samples of the gradients of one class.
template <class T>
struct GradientSums {
    F<T> mu, logvar;
    CALSEG_MEMBER void add(F<T> g, F<T> z) {
        mu = mu + g;
        logvar = logvar + g * z;
    }
};

// kClasses is the number of classes where the compiler is to know it, else 0.
template <class T, int kClasses = 0>
class GaussianBlock {
 public:
    // Number of classes with noise of their own. By the noise contract, samples of up to two classes share a
    // quad of random words, and more classes are padded to whole quads.
    static int64_t padded_classes(int64_t C) { return C <= 2 ? C : round_up(C, 4); }
    // Number of samples that are drawn at a time: a group starts on a quad, and the nearest cache holds its rows.
    static int64_t group(int64_t C) { return C <= 2 ? 8 / C : C <= 32 ? 4 : 2; }
    static int64_t noise_rows(int64_t C) { return round_up(group(C) * padded_classes(C), 4); }

    GaussianBlock(Scratch& scratch, const Sampling& gaussian, int64_t num_classes)
        : grad_mu(scratch.take<T>(num_classes * kLanes)),
          grad_logvar(scratch.take<T>(num_classes * kLanes)),
          C_(num_classes),
          noise_(scratch.take<T>(noise_rows(num_classes) * kLanes)),
          e_(scratch.take<T>(group(num_classes) * num_classes * kLanes)),
          per_sum_(scratch.take<T>(group(num_classes) * kLanes)),
          dot_(scratch.take<T>(group(num_classes) * kLanes)),
          philox_(gaussian.seed),
          num_samples_(gaussian.num_samples),
          temperature_(static_cast<T>(gaussian.temperature)),
          per_temperature_(T(1) / temperature_),
          prior_mu_(static_cast<T>(gaussian.prior_mu)),
          prior_logvar_(static_cast<T>(gaussian.prior_logvar)),
          prior_precision_(static_cast<T>(std::exp(-gaussian.prior_logvar))) {}

    // Takes a block: turns mu into mu / temperature and logvar into sigma / temperature, and returns the KL term if kKL.
    template <bool kKL>
    CALSEG_MEMBER F<T> set(T* mu, T* logvar, uint64_t first_voxel) {
        mean = mu;
        deviation = logvar;
        philox_.set_voxels(first_voxel);
        const F<T> per_temperature = broadcast<F<T>>(per_temperature_), half = broadcast<F<T>>(T(0.5));
        const F<T> prior_mu = broadcast<F<T>>(prior_mu_), prior_logvar = broadcast<F<T>>(prior_logvar_);
        const F<T> precision = broadcast<F<T>>(prior_precision_), one = broadcast<F<T>>(T(1));
        F<T> kl = zero<T>();
        for_classes(C(), [&](auto group, int64_t c) {
            constexpr int K = decltype(group)::value;
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

    // Writes the sum over samples nu of their softmax to estimate if kEstimate. If kGradient, a is the gradient of the result
    // with respect to the mean of the softmaxes: writes the sum over samples of the gradient of nu, times num_samples *
    // temperature, to grad_mu, and that of the same times the noise to grad_logvar.
    template <bool kEstimate, bool kGradient>
    CALSEG_MEMBER void add_samples(T* estimate, const T* a) {
        for (int64_t first = 0; first < num_samples_; first += group(C())) {
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

    // Returns the sum over samples nu of -log softmax(nu)[label]. If kGradient, writes the sum of its gradients to grad_mu, and
    // that of the gradients times the noise to grad_logvar.
    template <bool kGradient>
    CALSEG_MEMBER F<T> add_label_samples(I<T> labels) {
        const F<T> none = zero<T>(), one = broadcast<F<T>>(T(1));
        F<T> loss = none;
        for (int64_t first = 0; first < num_samples_; first += group(C())) {
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

    // Turns mean and deviation into the gradients of mu and logvar: the sums over samples times sample_scale, plus the gradient
    // of the KL term times kl_scale if kKL.
    template <bool kKL>
    CALSEG_MEMBER void finish_gradients(F<T> sample_scale, F<T> kl_scale) {
        const F<T> temperature = broadcast<F<T>>(temperature_), precision = broadcast<F<T>>(prior_precision_);
        const F<T> prior_mu = broadcast<F<T>>(prior_mu_), half = broadcast<F<T>>(T(0.5)), one = broadcast<F<T>>(T(1)), none = zero<T>();
        const auto off = equal(kl_scale, none);  // voxels that do not count get exactly 0, whatever their variance
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

    T *mean = nullptr, *deviation = nullptr;  // [C][kLanes] of the tile
    T *grad_mu, *grad_logvar;                 // [C][kLanes]

 private:
    CALSEG_MEMBER int64_t C() const { return kClasses ? kClasses : C_; }

    // Draws the noise of the group of samples that begins with sample `first`. Returns the number of its samples.
    CALSEG_MEMBER int64_t draw_group(int64_t first) {
        const int64_t Cp = padded_classes(C());
        const int64_t count = smaller(group(C()), num_samples_ - first), quads = (count * Cp + 3) / 4;
        int64_t quad = 0;
        for (; quad + 2 <= quads; quad += 2) make_noise<2>(first * Cp / 4, quad);
        if (quad < quads) make_noise<1>(first * Cp / 4, quad);
        return count;
    }

    CALSEG_MEMBER T* e_of(int64_t k, int64_t c) { return e_ + (k * C() + c) * kLanes; }
    CALSEG_MEMBER const T* noise_of(int64_t k, int64_t c) { return noise_ + (k * padded_classes(C()) + c) * kLanes; }

    // Computes e = exp(nu - max) of sample k of the group, and returns the sum. Calls visit(c, nu - max, e) for every class.
    template <class Visit>
    CALSEG_MEMBER F<T> softmax(int64_t k, const Visit& visit) {
        F<T> top = broadcast<F<T>>(T(-INFINITY));
        for (int64_t c = 0; c < C(); ++c) {
            const F<T> nu = load<F<T>>(mean + c * kLanes) + load<F<T>>(deviation + c * kLanes) * load<F<T>>(noise_of(k, c));
            top = larger(nu, top);
            store(e_of(k, c), nu);
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

    // Sums that the groups before sample `first` left.
    CALSEG_MEMBER F<T> previous(const T* sums, int64_t c, int64_t first) { return first == 0 ? zero<T>() : load<F<T>>(sums + c * kLanes); }

    CALSEG_MEMBER void store_gradient(int64_t c, const GradientSums<T>& sums) {
        store(grad_mu + c * kLanes, sums.mu);
        store(grad_logvar + c * kLanes, sums.logvar);
    }

    // Draws the noise of K quads of the group from `quad` on. `first` is the group's first quad.
    template <int K>
    CALSEG_MEMBER void make_noise(int64_t first, int64_t quad) {
        alignas(64) uint32_t words[K][4][kLanes];
        philox_.template words<K>(static_cast<uint32_t>(first + quad), words);
        T* const to = noise_ + 4 * quad * kLanes;
        // the second pair of a sample's last quad is not needed if that quad has one or two classes
        const int64_t classes = C(), per_sample = padded_classes(classes) / 4, until_last = per_sample - 1 - quad % larger(per_sample, 1);
        const bool half_wanted = classes > 2 && (classes % 4 == 1 || classes % 4 == 2);
        if (half_wanted && until_last < K) make_pairs<2 * K - 1>(words, to, static_cast<int>(2 * until_last + 1));
        else make_pairs<2 * K>(words, to, 2 * K);
    }

    // Draws N pairs of normals. Pair `skip` is left out.
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
    T* noise_;           // [group][Cp][kLanes]
    T* e_;               // [group][C][kLanes]
    T *per_sum_, *dot_;  // [group][kLanes]
    Philox philox_;
    int64_t num_samples_;
    T temperature_, per_temperature_, prior_mu_, prior_logvar_, prior_precision_;
};

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
