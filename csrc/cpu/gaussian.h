// The Gaussian over the logits of a block of voxels: its KL term, its noise, and the softmax of its samples.
#pragma once

#include "cpu/cross_entropy.h"
#include "cpu/philox.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

template <class T>
class GaussianBlock {
 public:
    // The noise contract: C <= 2 classes share a quad between samples, more are padded to whole quads. Quads are made
    // two at a time, so the noise of `period` samples is made at once: an even number of quads.
    static int64_t padded_classes(int64_t C) { return C <= 2 ? C : round_up(C, 4); }
    static int64_t period(int64_t C) { return C <= 2 ? 8 / C : padded_classes(C) % 8 ? 2 : 1; }
    static int64_t noise_rows(int64_t C) { return period(C) * padded_classes(C); }
    static int64_t bytes(int64_t C) { return Scratch::bytes<T>(noise_rows(C) * kLanes) + 3 * Scratch::bytes<T>(C * kLanes); }

    GaussianBlock(Scratch& scratch, const Gaussian& gaussian, int64_t num_classes)
        : C(num_classes),
          e(scratch.take<T>(C * kLanes)),
          grad_mu(scratch.take<T>(C * kLanes)),
          grad_logvar(scratch.take<T>(C * kLanes)),
          noise_(scratch.take<T>(noise_rows(C) * kLanes)),
          philox_(gaussian.seed),
          num_samples_(gaussian.num_samples),
          temperature_(static_cast<T>(gaussian.temperature)),
          prior_mu_(static_cast<T>(gaussian.prior_mu)),
          prior_logvar_(static_cast<T>(gaussian.prior_logvar)),
          prior_precision_(static_cast<T>(std::exp(-gaussian.prior_logvar))) {}

    // mu becomes mu / temperature, logvar becomes sigma / temperature; returns the KL term where kKL.
    template <bool kKL>
    CALSEG_MEMBER F<T> set(T* mu, T* logvar, uint64_t first_voxel) {
        mean = mu;
        deviation = logvar;
        philox_.set_voxels(first_voxel);
        const F<T> per_temperature = broadcast<F<T>>(T(1) / temperature_), half = broadcast<F<T>>(T(0.5));
        const F<T> prior_mu = broadcast<F<T>>(prior_mu_), prior_logvar = broadcast<F<T>>(prior_logvar_);
        const F<T> precision = broadcast<F<T>>(prior_precision_), one = broadcast<F<T>>(T(1));
        F<T> kl = zero<T>();
        for_classes(C, [&](auto group, int64_t c) {
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
        clear_block(grad_mu, C);
        clear_block(grad_logvar, C);
    }

    // The noise [C][kLanes] of sample k. Samples are asked for in order: k = 0, 1, ...
    CALSEG_MEMBER const T* noise(int64_t k) {
        const int64_t Cp = padded_classes(C), within = k % period(C);
        if (within == 0) {
            const int64_t first = k * Cp / 4, quads = (smaller(period(C), num_samples_ - k) * Cp + 3) / 4;
            int64_t quad = 0;
            for (; quad + 2 <= quads; quad += 2) make_noise<2>(first, quad);
            if (quad < quads) make_noise<1>(first, quad);
        }
        return noise_ + within * Cp * kLanes;
    }

    // e = nu = mean + deviation * z; returns the maximum over classes.
    CALSEG_MEMBER F<T> draw(const T* z) {
        F<T> top = load<F<T>>(mean) + load<F<T>>(deviation) * load<F<T>>(z);
        store(e, top);
        for (int64_t c = 1; c < C; ++c) {
            const F<T> nu = load<F<T>>(mean + c * kLanes) + load<F<T>>(deviation + c * kLanes) * load<F<T>>(z + c * kLanes);
            top = larger(nu, top);
            store(e + c * kLanes, nu);
        }
        return top;
    }

    // Sample k's softmax is added to estimate, and with kGradient, a = dLoss/dy_hat, dLoss/dnu (times m * temperature)
    // to grad_mu and dLoss/dnu * eps to grad_logvar.
    template <bool kEstimate, bool kGradient>
    CALSEG_MEMBER void add_sample(int64_t k, T* estimate, const T* a) {
        const T* z = noise(k);
        const F<T> top = draw(z);
        F<T> sum = zero<T>(), dot = sum;
        for_classes(C, [&](auto group, int64_t c) {
            constexpr int K = decltype(group)::value;
            F<T> s[K];
            for (int j = 0; j < K; ++j) s[j] = load<F<T>>(e + (c + j) * kLanes) - top;
            exp_nonpositive(s);
            sum = sum + sum_of(s);
            for (int j = 0; j < K; ++j) {
                if (kGradient) dot = dot + load<F<T>>(a + (c + j) * kLanes) * s[j];
                store(e + (c + j) * kLanes, s[j]);
            }
        });
        const F<T> per_sum = broadcast<F<T>>(T(1)) / sum;
        dot = dot * per_sum;
        for (int64_t c = 0; c < C; ++c) {
            const F<T> s = load<F<T>>(e + c * kLanes) * per_sum;
            if (kEstimate) store(estimate + c * kLanes, load<F<T>>(estimate + c * kLanes) + s);
            if (kGradient) add_gradient(c, s * (load<F<T>>(a + c * kLanes) - dot), z);
        }
    }

    CALSEG_MEMBER void add_gradient(int64_t c, F<T> g, const T* z) {
        store(grad_mu + c * kLanes, load<F<T>>(grad_mu + c * kLanes) + g);
        store(grad_logvar + c * kLanes, load<F<T>>(grad_logvar + c * kLanes) + g * load<F<T>>(z + c * kLanes));
    }

    // mean and deviation become the gradients of mu and logvar: the sums times sample_scale (times temperature: the
    // chain from mu / temperature), plus kl_scale times the gradient of the KL term.
    template <bool kKL>
    CALSEG_MEMBER void finish_gradients(F<T> sample_scale, F<T> kl_scale) {
        const F<T> temperature = broadcast<F<T>>(temperature_), precision = broadcast<F<T>>(prior_precision_);
        const F<T> prior_mu = broadcast<F<T>>(prior_mu_), half = broadcast<F<T>>(T(0.5)), one = broadcast<F<T>>(T(1)), none = zero<T>();
        const auto off = equal(kl_scale, none);  // a voxel that does not count gives exactly 0, whatever its variance
        for (int64_t c = 0; c < C; ++c) {
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

    int64_t C;
    T *mean = nullptr, *deviation = nullptr;  // [C][kLanes] of the tile
    T *e, *grad_mu, *grad_logvar;             // [C][kLanes]

 private:
    template <int K>
    CALSEG_MEMBER void make_noise(int64_t first, int64_t quad) {
        alignas(64) uint32_t words[K][4][kLanes];
        philox_.template words<K>(static_cast<uint32_t>(first + quad), words);
        const uint32_t *a[2 * K], *b[2 * K];
        for (int pair = 0; pair < 2 * K; ++pair) {
            a[pair] = words[pair / 2][2 * (pair % 2)];
            b[pair] = words[pair / 2][2 * (pair % 2) + 1];
        }
        F<T> z0[2 * K], z1[2 * K];
        box_muller(a, b, z0, z1);
        for (int pair = 0; pair < 2 * K; ++pair) {
            store(noise_ + (4 * quad + 2 * pair) * kLanes, z0[pair]);
            store(noise_ + (4 * quad + 2 * pair + 1) * kLanes, z1[pair]);
        }
    }

    T* noise_;  // [noise_rows][kLanes]
    Philox philox_;
    int64_t num_samples_;
    T temperature_, prior_mu_, prior_logvar_, prior_precision_;
};

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
