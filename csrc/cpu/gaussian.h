// Gaussian over the logits of a block of voxels: its KL term, its samples, and the gradients of mu and logvar.
//
// Samples come in antithetic pairs: with sigma = exp(logvar / 2) and the noise z of pair p, sample 2p of a class is
// nu = mu + sigma * z, and sample 2p + 1 is nu = mu - sigma * z. The noise is drawn again whenever it is needed and never
// stored for a whole tensor.
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

// Two values of a pair of samples: of the one with plus the noise, and of the one with minus the noise.
template <class T>
struct Pair {
    F<T> plus, minus;
};

// Sums over samples, for one class: of the gradient g of nu, and of g times the noise.
template <class T>
struct GradientSums {
    F<T> mu, logvar;
    // Adds the gradients of a pair of samples with the noise z and -z.
    CALSEG_MEMBER void add(Pair<T> g, F<T> z) {
        mu = mu + (g.plus + g.minus);
        logvar = logvar + (g.plus - g.minus) * z;
    }
};

// kClasses is the number of classes if it is known at compile time, else 0.
template <class T, int kClasses = 0>
class GaussianBlock {
 public:
    // Returns the number of normals of a pair of samples. The noise contract pads more than two classes to whole quads of
    // random words. With up to two classes, several pairs share a quad.
    static int64_t padded_classes(int64_t C) { return C <= 2 ? C : round_up(C, 4); }
    // Returns the number of pairs in a group, which are drawn together. A group starts on a whole quad, and the first-level
    // cache holds its rows.
    static int64_t group_size(int64_t C) { return C <= 2 ? 4 / C : C <= 32 ? 2 : 1; }
    static int64_t noise_rows(int64_t C) { return round_up(group_size(C) * padded_classes(C), 4); }

    GaussianBlock(Scratch& scratch, const Sampling& gaussian, int64_t num_classes)
        : grad_mu(scratch.take<T>(num_classes * kLanes)),
          grad_logvar(scratch.take<T>(num_classes * kLanes)),
          C_(num_classes),
          noise_(scratch.take<T>(noise_rows(num_classes) * kLanes)),
          at_mean_(scratch.take<T>(num_classes * kLanes)),
          e_(scratch.take<T>(2 * group_size(num_classes) * num_classes * kLanes)),
          per_sum_(scratch.take<T>(2 * group_size(num_classes) * kLanes)),
          dot_(scratch.take<T>(2 * group_size(num_classes) * kLanes)),
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
    // with respect to nu of one sample, times num_samples * temperature. `a` must not be near the largest float, as kUnitSlope
    // times a finite number is not. Writes the sum over samples of g to grad_mu, and
    // that of g times the noise to grad_logvar. finish_gradients() applies the factors that are missing.
    template <bool kEstimate, bool kGradient>
    CALSEG_MEMBER void add_samples(T* estimate, const T* a) {
        begin_samples();
        for (int64_t first = 0; first < num_samples_; first += 2 * group_size(C())) {
            const int64_t count = draw_group(first);
            for (int64_t k = 0; k < count; k += 2) {
                Pair<T> dot = {zero<T>(), zero<T>()};
                const auto sums = exponentials(k, [&](int64_t c, Pair<T> e, F<T>) {
                    if (!kGradient) return;
                    const F<T> slope = load<F<T>>(a + c * kLanes);
                    dot = {dot.plus + slope * e.plus, dot.minus + slope * e.minus};
                });
                store_factors(k, sums.sum.plus, dot.plus);
                store_factors(k + 1, sums.sum.minus, dot.minus);
            }
            clear_partner(count);
            for (int64_t c = 0; c < C(); ++c) {
                const F<T> slope = kGradient ? load<F<T>>(a + c * kLanes) : zero<T>();
                F<T> total = kEstimate ? previous(estimate, c, first) : zero<T>();
                GradientSums<T> gradient;
                if (kGradient) gradient = {previous(grad_mu, c, first), previous(grad_logvar, c, first)};
                for (int64_t k = 0; k < count; k += 2) {
                    const Pair<T> e = e_of(k, c), per_sum = pair_of(per_sum_, k);
                    if (kEstimate) total = total + (e.plus * per_sum.plus + e.minus * per_sum.minus);
                    if (!kGradient) continue;
                    const Pair<T> dot = pair_of(dot_, k);
                    gradient.add({e.plus * (slope * per_sum.plus - dot.plus), e.minus * (slope * per_sum.minus - dot.minus)},
                                 noise_of(k, c));
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
        const F<T> none = zero<T>();
        const auto of_label = [&](int64_t c, F<T> value, F<T> otherwise) {
            return select(equal(labels, broadcast<I<T>>(static_cast<int32_t>(c))), value, otherwise);
        };
        begin_samples();
        F<T> loss = none, label_mean = none;
        for (int64_t c = 0; c < C(); ++c) label_mean = of_label(c, load<F<T>>(mean + c * kLanes), label_mean);
        for (int64_t first = 0; first < num_samples_; first += 2 * group_size(C())) {
            const int64_t count = draw_group(first);
            for (int64_t k = 0; k < count; k += 2) {
                F<T> label_d = none;  // deviation of the label's logit from its mean
                const auto sums = exponentials(k, [&](int64_t c, Pair<T>, F<T> d) { label_d = of_label(c, d, label_d); });
                loss = loss + (log_positive(sums.sum.plus) - ((label_mean + label_d) - sums.top.plus));
                if (k + 1 < count) loss = loss + (log_positive(sums.sum.minus) - ((label_mean - label_d) - sums.top.minus));
                if (!kGradient) continue;
                store(per_sum_ + k * kLanes, reciprocal(sums.sum.plus));
                store(per_sum_ + (k + 1) * kLanes, reciprocal(sums.sum.minus));
            }
            if (!kGradient) continue;
            clear_partner(count);
            for (int64_t c = 0; c < C(); ++c) {
                const F<T> hit = of_label(c, broadcast<F<T>>(T(1)), none);
                GradientSums<T> gradient = {previous(grad_mu, c, first), previous(grad_logvar, c, first)};
                for (int64_t k = 0; k < count; k += 2) {
                    const Pair<T> e = e_of(k, c), per_sum = pair_of(per_sum_, k);
                    gradient.add({e.plus * per_sum.plus - hit, e.minus * per_sum.minus - (k + 1 < count ? hit : none)}, noise_of(k, c));
                }
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

    static constexpr double kUnitSlope = 0x1p-44;  // times an exponential of a pair, any float stays finite

    T *mean = nullptr, *deviation = nullptr;  // [C][kLanes] the block of the tiles of mu and logvar, which set() changed
    T *grad_mu, *grad_logvar;                 // [C][kLanes] sums over samples

    // ---- steps of a sum over samples, for losses with a sum of their own ----

    CALSEG_MEMBER int64_t C() const { return kClasses ? kClasses : C_; }

    // Computes what all samples of the block share. Comes before the first group.
    CALSEG_MEMBER void begin_samples() {
        F<T> largest = zero<T>();
        top_ = broadcast<F<T>>(T(-INFINITY));
        for (int64_t c = 0; c < C(); ++c) {
            top_ = larger(load<F<T>>(mean + c * kLanes), top_);
            largest = larger(load<F<T>>(deviation + c * kLanes), largest);  // leaves a NaN out, which reaches every result anyway
        }
        shares_ = less(largest, broadcast<F<T>>(T(kLargestShared)));
        all_share_ = C() > 1 && all(shares_);
        for_classes(C(), [&](auto at_once, int64_t c) {
            constexpr int K = decltype(at_once)::value;
            F<T> e[K];
            for (int j = 0; j < K; ++j) e[j] = load<F<T>>(mean + (c + j) * kLanes) - top_;
            exp_nonpositive(e);
            for (int j = 0; j < K; ++j) store(at_mean_ + (c + j) * kLanes, e[j]);
        });
    }

    // Draws the noise of the group of pairs that begins with sample `first`. Returns the number of samples in the group,
    // which is odd if the last sample has no partner.
    CALSEG_MEMBER int64_t draw_group(int64_t first) {
        const int64_t Cp = padded_classes(C());
        const int64_t count = smaller(2 * group_size(C()), num_samples_ - first), quads = ((count + 1) / 2 * Cp + 3) / 4;
        const int64_t first_quad = first / 2 * Cp / 4;
        int64_t quad = 0;
        for (; quad + 2 <= quads; quad += 2) make_noise<2>(first_quad, quad);
        if (quad < quads) make_noise<1>(first_quad, quad);
        return count;
    }

    // Returns what exponentials() stored, and the noise, for the pair that begins with sample k of the group.
    CALSEG_MEMBER Pair<T> e_of(int64_t k, int64_t c) const {
        return {load<F<T>>(e_ + (k * C() + c) * kLanes), load<F<T>>(e_ + ((k + 1) * C() + c) * kLanes)};
    }
    CALSEG_MEMBER F<T> noise_of(int64_t k, int64_t c) const { return load<F<T>>(noise_ + (k / 2 * padded_classes(C()) + c) * kLanes); }

    // Sums over classes of e = exp((nu - top) / temperature), and top / temperature, of a pair of samples.
    struct Exponentials {
        Pair<T> sum, top;
    };

    // Computes e for the pair that begins with sample k of the group. Calls visit(c, e, d) for every class, where d is
    // sigma * z / temperature.
    template <class Visit>
    CALSEG_MEMBER Exponentials exponentials(int64_t k, const Visit& visit) {
        return all_share_ ? shared_exponentials(k, visit) : any_exponentials(k, visit);
    }

    // Returns the two values of a pair in an array that has a row for each sample of the group.
    CALSEG_MEMBER Pair<T> pair_of(const T* rows, int64_t k) const {
        return {load<F<T>>(rows + k * kLanes), load<F<T>>(rows + (k + 1) * kLanes)};
    }

    // Stores the factors of sample k, so that the sum of its gradient is e * (slope * per_sum - dot).
    CALSEG_MEMBER void store_factors(int64_t k, F<T> sum, F<T> dot) {
        const F<T> per_sum = reciprocal(sum);
        store(per_sum_ + k * kLanes, per_sum);
        store(dot_ + k * kLanes, (dot * per_sum) * per_sum);
    }

    // Takes the sample after the last one out of all sums, if the number of samples in the group is odd.
    CALSEG_MEMBER void clear_partner(int64_t count) {
        if (count % 2 == 0) return;
        store(per_sum_ + count * kLanes, zero<T>());
        store(dot_ + count * kLanes, zero<T>());
    }

    // Returns the sum over the groups of samples before sample `first`.
    CALSEG_MEMBER F<T> previous(const T* sums, int64_t c, int64_t first) { return first == 0 ? zero<T>() : load<F<T>>(sums + c * kLanes); }

    CALSEG_MEMBER void store_gradient(int64_t c, const GradientSums<T>& sums) {
        store(grad_mu + c * kLanes, sums.mu);
        store(grad_logvar + c * kLanes, sums.logvar);
    }

 private:
    // Largest sigma / temperature for which a pair shares its exponentials. A normal is at most 5.9, so e^d then lies between
    // e^-29.5 and e^29.5. A class whose e^(mu - top) is 0 in float has a probability below e^(59 - 87) in every sample.
    static constexpr double kLargestShared = 5.0;

    // Computes e^(mu + d) and e^(mu - d) as the product of e^mu with e^d, and with 1 / e^d.
    template <class Visit>
    CALSEG_MEMBER Exponentials shared_exponentials(int64_t k, const Visit& visit) {
        Pair<T> sum = {zero<T>(), zero<T>()};
        for_classes(C(), [&](auto at_once, int64_t c) {
            constexpr int K = decltype(at_once)::value;
            F<T> d[K], e[K];
            for (int j = 0; j < K; ++j) e[j] = d[j] = load<F<T>>(deviation + (c + j) * kLanes) * noise_of(k, c + j);
            exp_bounded(e);
            F<T> plus[K], minus[K];
            for (int j = 0; j < K; ++j) {
                const F<T> at_mean = load<F<T>>(at_mean_ + (c + j) * kLanes);
                plus[j] = at_mean * e[j];
                minus[j] = at_mean * reciprocal(e[j]);
            }
            sum = {sum.plus + sum_of(plus), sum.minus + sum_of(minus)};
            for (int j = 0; j < K; ++j) {
                visit(c + j, Pair<T>{plus[j], minus[j]}, d[j]);
                store_pair(k, c + j, {plus[j], minus[j]});
            }
        });
        return {sum, {top_, top_}};
    }

    // Computes e^(mu + d) and e^(mu - d) one by one where sigma is large, and as shared_exponentials() elsewhere. So the
    // result of a voxel does not depend on the voxels beside it.
    template <class Visit>
    CALSEG_MEMBER Exponentials any_exponentials(int64_t k, const Visit& visit) {
        Pair<T> top = {broadcast<F<T>>(T(-INFINITY)), broadcast<F<T>>(T(-INFINITY))}, sum = {zero<T>(), zero<T>()};
        const auto deviate = [&](int64_t c) { return load<F<T>>(deviation + c * kLanes) * noise_of(k, c); };
        for (int64_t c = 0; c < C(); ++c) {
            const F<T> m = load<F<T>>(mean + c * kLanes), d = deviate(c);
            top = {larger(m + d, top.plus), larger(m - d, top.minus)};
        }
        if (C() > 1) top = {select(shares_, top_, top.plus), select(shares_, top_, top.minus)};
        for_classes(C(), [&](auto at_once, int64_t c) {
            constexpr int K = decltype(at_once)::value;
            F<T> d[K], e[K], plus[K], minus[K];
            for (int j = 0; j < K; ++j) {
                const F<T> m = load<F<T>>(mean + (c + j) * kLanes);
                e[j] = d[j] = deviate(c + j);
                plus[j] = (m + d[j]) - top.plus;
                minus[j] = (m - d[j]) - top.minus;
            }
            exp_nonpositive(plus);
            exp_nonpositive(minus);
            exp_bounded(e);
            for (int j = 0; j < K && C() > 1; ++j) {
                const F<T> at_mean = load<F<T>>(at_mean_ + (c + j) * kLanes);
                plus[j] = select(shares_, at_mean * e[j], plus[j]);
                minus[j] = select(shares_, at_mean * reciprocal(e[j]), minus[j]);
            }
            sum = {sum.plus + sum_of(plus), sum.minus + sum_of(minus)};
            for (int j = 0; j < K; ++j) {
                visit(c + j, Pair<T>{plus[j], minus[j]}, d[j]);
                store_pair(k, c + j, {plus[j], minus[j]});
            }
        });
        return {sum, top};
    }

    CALSEG_MEMBER void store_pair(int64_t k, int64_t c, Pair<T> e) {
        store(e_ + (k * C() + c) * kLanes, e.plus);
        store(e_ + ((k + 1) * C() + c) * kLanes, e.minus);
    }

    // Draws the noise of K quads. `first` is the first quad of the group. `quad` counts from there.
    template <int K>
    CALSEG_MEMBER void make_noise(int64_t first, int64_t quad) {
        alignas(64) uint32_t words[K][4][kLanes];
        philox_.template words<K>(static_cast<uint32_t>(first + quad), words);
        T* const to = noise_ + 4 * quad * kLanes;
        // A quad has two couples of normals. If the last quad of a pair of samples holds only one or two classes, its second couple is
        // not needed.
        const int64_t classes = C(), per_pair = padded_classes(classes) / 4, until_last = per_pair - 1 - quad % larger(per_pair, 1);
        const bool half_wanted = classes > 2 && (classes % 4 == 1 || classes % 4 == 2);
        if (half_wanted && until_last < K) make_normals<2 * K - 1>(words, to, static_cast<int>(2 * until_last + 1));
        else make_normals<2 * K>(words, to, 2 * K);
    }

    // Makes N couples of normals from the words of K quads. Couple number `skip` is left out.
    template <int N, int K>
    CALSEG_MEMBER void make_normals(const uint32_t (&words)[K][4][kLanes], T* to, int skip) {
        const uint32_t *a[N], *b[N];
        F<T> z0[N], z1[N];
        for (int i = 0; i < N; ++i) {
            const int couple = i + (i >= skip);
            a[i] = words[couple / 2][2 * (couple % 2)];
            b[i] = words[couple / 2][2 * (couple % 2) + 1];
        }
        box_muller(a, b, z0, z1);
        for (int i = 0; i < N; ++i) {
            const int couple = i + (i >= skip);
            store(to + 2 * couple * kLanes, z0[i]);
            store(to + (2 * couple + 1) * kLanes, z1[i]);
        }
    }

    int64_t C_;
    F<T> top_;        // largest mu / temperature over classes
    M<T> shares_;     // voxels whose pairs share their exponentials, if there is more than one class
    bool all_share_;  // whether all of them do
    T* noise_;        // [group_size][padded_classes][kLanes] noise of the pairs of a group
    T* at_mean_;      // [C][kLanes] exp((mu - top) / temperature)
    T* e_;            // [2 * group_size][C][kLanes] exponentials of the samples of a group
    T* per_sum_;      // [2 * group_size][kLanes] 1 / sum over classes of e
    T* dot_;          // [2 * group_size][kLanes] (sum over classes of a * e) / (sum of e)^2
    Philox philox_;
    int64_t num_samples_;
    T temperature_, per_temperature_, prior_mu_, prior_logvar_, prior_precision_;
};

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
