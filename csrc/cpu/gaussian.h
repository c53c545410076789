// The Gaussian over the logits of a tile: its KL term, and the noise and softmax of its samples.
#pragma once

#include "cpu/philox.h"
#include "cpu/tile.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Rows of the noise contract: C <= 2 classes share a quad between samples, more are padded to whole quads.
CALSEG_INLINE int64_t padded_classes(int64_t C) { return C <= 2 ? C : round_up(C, 4); }

template <class T>
struct GaussianTile {
    int stride = 0;
    int64_t C = 0, Cp = 0;
    T *mean, *deviation;   // [C][stride]: mu / temperature, sigma / temperature
    T* eps;                // [max(Cp, 4)][stride]
    T* e;                  // [C][stride]: nu, then exp(nu - max)
    T *maximum, *inverse, *dot, *kl;  // [stride]
    uint32_t* words;       // [4][stride]
    uint64_t* cache;       // [3][stride]
    PhiloxTile philox;

    static int64_t noise_rows(int64_t C) { return larger(padded_classes(C), 4); }
    static int64_t bytes(int64_t C, int64_t length) {
        return 3 * Scratch::bytes<T>(C * length) + Scratch::bytes<T>(noise_rows(C) * length) +
               4 * Scratch::bytes<T>(length) + Scratch::bytes<uint32_t>(4 * length) + Scratch::bytes<uint64_t>(3 * length);
    }

    GaussianTile(Scratch& scratch, int64_t num_classes, int length)
        : stride(length),
          C(num_classes),
          Cp(padded_classes(num_classes)),
          mean(scratch.take<T>(C * length)),
          deviation(scratch.take<T>(C * length)),
          eps(scratch.take<T>(noise_rows(C) * length)),
          e(scratch.take<T>(C * length)),
          maximum(scratch.take<T>(length)),
          inverse(scratch.take<T>(length)),
          dot(scratch.take<T>(length)),
          kl(scratch.take<T>(length)),
          words(scratch.take<uint32_t>(4 * length)),
          cache(scratch.take<uint64_t>(3 * length)),
          philox(cache, length) {}

    // Loads mu and logvar; ignored voxels (labels < 0) are cleared. kl is set where with_kl.
    void load(const Gaussian& g, const int32_t* labels, bool any_ignored, int64_t n, int64_t s, int count, int padded, bool with_kl) {
        load_tile(mean, stride, g.mu, n, s, count, padded, C);
        load_tile(deviation, stride, g.logvar, n, s, count, padded, C);
        if (any_ignored) {
            clear_ignored(mean, stride, labels, padded, C);
            clear_ignored(deviation, stride, labels, padded, C);
        }
        const T per_temperature = T(1) / static_cast<T>(g.temperature);
        const T prior_mu = static_cast<T>(g.prior_mu), prior_logvar = static_cast<T>(g.prior_logvar);
        const T prior_precision = static_cast<T>(std::exp(-g.prior_logvar));
        T* CALSEG_RESTRICT row_kl = kl;
        for (int i = 0; i < padded; ++i) row_kl[i] = T(0);
        for (int64_t c = 0; c < C; ++c) {
            T *CALSEG_RESTRICT mu = mean + c * stride, *CALSEG_RESTRICT logvar = deviation + c * stride;
            if (with_kl) {
                for (int i = 0; i < padded; ++i) {
                    const T sigma = exp_any(T(0.5) * logvar[i]), gap = mu[i] - prior_mu;
                    row_kl[i] += (prior_logvar - logvar[i]) + ((sigma * sigma + gap * gap) * prior_precision - T(1));
                    mu[i] *= per_temperature;
                    logvar[i] = sigma * per_temperature;
                }
            } else {
                for (int i = 0; i < padded; ++i) {
                    mu[i] *= per_temperature;
                    logvar[i] = exp_any(T(0.5) * logvar[i]) * per_temperature;
                }
            }
        }
        for (int i = 0; i < padded; ++i) row_kl[i] *= T(0.5);
        if (any_ignored)
            for (int i = 0; i < padded; ++i) row_kl[i] = labels[i] < 0 ? T(0) : row_kl[i];
    }

    // The noise rows [C][stride] of sample k. Samples must be asked for in order: k = 0, 1, ...
    const T* noise(int64_t k, int padded) {
        const int64_t samples_per_quad = C <= 2 ? 4 / C : 1, quads = C <= 2 ? 1 : Cp / 4;
        if (k % samples_per_quad == 0)
            for (int64_t quad = 0; quad < quads; ++quad) {
                philox.words(static_cast<uint32_t>(k / samples_per_quad * quads + quad), words, stride);
                normals(eps + 4 * quad * stride, padded);
            }
        return eps + k % samples_per_quad * C * stride;
    }

    // e = exp(nu - max) with nu = mean + deviation * eps of sample k; inverse = 1 / sum e; returns the noise rows.
    const T* softmax_sample(int64_t k, int padded) {
        const T* CALSEG_RESTRICT noise_rows = noise(k, padded);
        T *CALSEG_RESTRICT top = maximum, *CALSEG_RESTRICT sum = inverse, *CALSEG_RESTRICT rows = e;
        for (int64_t c = 0; c < C; ++c) {
            const T *CALSEG_RESTRICT m = mean + c * stride, *CALSEG_RESTRICT d = deviation + c * stride;
            const T* CALSEG_RESTRICT z = noise_rows + c * stride;
            T* CALSEG_RESTRICT row = rows + c * stride;
            if (c == 0)
                for (int i = 0; i < padded; ++i) top[i] = row[i] = m[i] + d[i] * z[i];
            else
                for (int i = 0; i < padded; ++i) {
                    row[i] = m[i] + d[i] * z[i];
                    top[i] = row[i] > top[i] ? row[i] : top[i];
                }
        }
        for (int i = 0; i < padded; ++i) sum[i] = T(0);
        for (int64_t c = 0; c < C; ++c) {
            T* CALSEG_RESTRICT row = rows + c * stride;
            for (int i = 0; i < padded; ++i) {
                row[i] = exp_nonpositive(row[i] - top[i]);
                sum[i] += row[i];
            }
        }
        for (int i = 0; i < padded; ++i) sum[i] = T(1) / sum[i];
        return noise_rows;
    }

    // Adds sample k's softmax to estimate (if given) and, with the gradient a = dLoss/dy_hat given, dLoss/dnu (times
    // m * temperature) to grad_mu and dLoss/dnu * eps to grad_logvar.
    void add_sample(int64_t k, int padded, T* CALSEG_RESTRICT estimate, const T* CALSEG_RESTRICT a, T* CALSEG_RESTRICT grad_mu,
                    T* CALSEG_RESTRICT grad_logvar) {
        const T* CALSEG_RESTRICT z = softmax_sample(k, padded);
        const T* CALSEG_RESTRICT s = e;
        const T* CALSEG_RESTRICT per_sum = inverse;
        if (estimate)
            for (int64_t c = 0; c < C; ++c)
                for (int i = 0; i < padded; ++i) estimate[c * stride + i] += s[c * stride + i] * per_sum[i];
        if (!a) return;
        T* CALSEG_RESTRICT sum = dot;
        for (int i = 0; i < padded; ++i) sum[i] = T(0);
        for (int64_t c = 0; c < C; ++c)
            for (int i = 0; i < padded; ++i) sum[i] += a[c * stride + i] * s[c * stride + i];
        for (int i = 0; i < padded; ++i) sum[i] *= per_sum[i];
        for (int64_t c = 0; c < C; ++c) {
            const int64_t row = c * stride;
            for (int i = 0; i < padded; ++i) {
                const T g = s[row + i] * per_sum[i] * (a[row + i] - sum[i]);
                grad_mu[row + i] += g;
                grad_logvar[row + i] += g * z[row + i];
            }
        }
    }

    // From the sums over samples to the gradients: times sample_scale[i] * temperature (the chain from mu / temperature),
    // plus kl_scale[i] times the gradient of the KL term. With kl_scale null, there is none.
    void finish_gradients(const Gaussian& g, int padded, const T* CALSEG_RESTRICT sample_scale, const T* CALSEG_RESTRICT kl_scale,
                          T* CALSEG_RESTRICT grad_mu, T* CALSEG_RESTRICT grad_logvar) const {
        const T temperature = static_cast<T>(g.temperature), prior_mu = static_cast<T>(g.prior_mu);
        const T prior_precision = static_cast<T>(std::exp(-g.prior_logvar));
        for (int64_t c = 0; c < C; ++c) {
            const int64_t row = c * stride;
            if (!kl_scale) {
                for (int i = 0; i < padded; ++i) {
                    grad_mu[row + i] *= sample_scale[i];
                    grad_logvar[row + i] *= sample_scale[i] * T(0.5) * temperature * deviation[row + i];
                }
                continue;
            }
            for (int i = 0; i < padded; ++i) {
                const T mu = mean[row + i] * temperature, sigma = deviation[row + i] * temperature;
                const T from_mu = (mu - prior_mu) * prior_precision;
                const T from_logvar = T(0.5) * (sigma * sigma * prior_precision - T(1));
                const T on = kl_scale[i];
                // a voxel that does not count gives exactly 0, whatever its variance
                grad_mu[row + i] = grad_mu[row + i] * sample_scale[i] + (on == T(0) ? T(0) : on * from_mu);
                grad_logvar[row + i] = grad_logvar[row + i] * (sample_scale[i] * T(0.5) * sigma) + (on == T(0) ? T(0) : on * from_logvar);
            }
        }
    }

   private:
    void normals(T* CALSEG_RESTRICT rows, int padded) {
        const uint32_t* CALSEG_RESTRICT w = words;
        for (int i = 0; i < padded; ++i) {
            box_muller(w[i], w[stride + i], rows[i], rows[stride + i]);
            box_muller(w[2 * stride + i], w[3 * stride + i], rows[2 * stride + i], rows[3 * stride + i]);
        }
    }
};

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
