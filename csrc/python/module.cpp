// The Python module calseg._native: a table of contents. Arguments come checked from calseg/ops.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host/buffer_pool.h"
#include "python/casters.h"
#include "cuda/plan.h"
#include "host/dispatch.h"
#include "python/pooled_tensor.h"
#include "host/operations.h"
#include "host/parallel.h"
#include "python/small_cross_entropy.h"

namespace py = pybind11;

namespace calseg {
namespace {

using Release = py::gil_scoped_release;

CrossEntropyArgs cross_entropy_args(const Shape& shape, const TensorView& logits, const TensorView& soft_labels, const Labels& labels,
                                    const TensorView& weight, double label_smoothing, const TensorView& grad_output, const TensorView& loss,
                                    const TensorView& grad_logits, const TensorView& grad_soft_labels) {
    return {shape, logits,      soft_labels,      labels, static_cast<const double*>(weight.data), label_smoothing, {grad_output, 1.0, 1.0},
            loss,  grad_logits, grad_soft_labels, nullptr};
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "CPU and CUDA kernels of calseg";

    m.def("cross_entropy", [](const Shape& shape, const TensorView& logits, const TensorView& soft_labels, const Labels& labels,
                              const TensorView& weight, double label_smoothing, const TensorView& grad_output, const TensorView& loss,
                              const TensorView& grad_logits, const TensorView& grad_soft_labels, int reduction, int num_threads) {
        const Release release;
        return cross_entropy(cross_entropy_args(shape, logits, soft_labels, labels, weight, label_smoothing, grad_output, loss, grad_logits,
                                                grad_soft_labels),
                             static_cast<Reduction>(reduction), num_threads);
    });
    m.def("small_cross_entropy", &small_cross_entropy);
    m.def("vls_cross_entropy",
          [](const Shape& shape, const TensorView& logits, const Gaussian& gaussian, const Labels& labels, const TensorView& weight,
             double label_smoothing, double alpha, const TensorView& grad_output, const TensorView& loss, const TensorView& grad_logits,
             const TensorView& grad_mu, const TensorView& grad_logvar, int reduction, int num_threads) {
              const Release release;
              return vls_cross_entropy(
                  {cross_entropy_args(shape, logits, {}, labels, weight, label_smoothing, grad_output, loss, grad_logits, {}), gaussian,
                   alpha, grad_mu, grad_logvar},
                  static_cast<Reduction>(reduction), num_threads);
          });
    m.def("vls_elbo",
          [](const Shape& shape, const Gaussian& gaussian, const Labels& labels, const TensorView& weight, const TensorView& grad_output,
             const TensorView& loss, const TensorView& grad_mu, const TensorView& grad_logvar, int reduction, int num_threads) {
              const Release release;
              return vls_elbo({shape,
                               gaussian,
                               labels,
                               static_cast<const double*>(weight.data),
                               {grad_output, 1.0, 1.0},
                               loss,
                               grad_mu,
                               grad_logvar,
                               nullptr},
                              static_cast<Reduction>(reduction), num_threads);
          });
    m.def("gaussian_kl", [](const Shape& shape, const Gaussian& gaussian, const TensorView& grad_output, const TensorView& loss,
                            const TensorView& grad_mu, const TensorView& grad_logvar, int reduction, int num_threads) {
        const Release release;
        return gaussian_kl({shape, gaussian, {grad_output, 1.0, 1.0}, loss, grad_mu, grad_logvar, nullptr},
                           static_cast<Reduction>(reduction), num_threads);
    });
    m.def("sample_soft_labels", [](const Shape& shape, const Gaussian& gaussian, const Labels& labels, double alpha,
                                   const TensorView& soft_labels, int num_threads) {
        const Release release;
        return sample_soft_labels({shape, gaussian, labels, alpha, soft_labels, {}, {}, {}}, num_threads);
    });
    m.def("sample_soft_labels_backward",
          [](const Shape& shape, const Gaussian& gaussian, const Labels& labels, double alpha, const TensorView& grad_output,
             const TensorView& grad_mu, const TensorView& grad_logvar, int num_threads) {
              const Release release;
              return sample_soft_labels_backward({shape, gaussian, labels, alpha, {}, grad_output, grad_mu, grad_logvar}, num_threads);
          });
    m.def("accumulate_softmax",
          [](const Shape& shape, const TensorView& logits, double temperature, const TensorView& total, int num_threads) {
              const Release release;
              accumulate_softmax({shape, logits, temperature, total, {}, {}}, num_threads);
          });
    m.def("accumulate_softmax_backward", [](const Shape& shape, const TensorView& logits, double temperature, const TensorView& grad_output,
                                            const TensorView& grad_logits, int num_threads) {
        const Release release;
        accumulate_softmax_backward({shape, logits, temperature, {}, grad_output, grad_logits}, num_threads);
    });
    m.def("blend_soft_labels", [](const Shape& shape, const TensorView& estimate, const Labels& labels, double alpha, double scale,
                                  const TensorView& blended, int num_threads) {
        const Release release;
        return blend_soft_labels({shape, estimate, blended, labels, alpha, scale}, num_threads);
    });

    m.def("calibration_bins", [](const Shape& shape, const TensorView& scores, const Labels& labels, const TensorView& mask, int64_t n_bins,
                                 int64_t first_class, bool from_logits, bool class_wise, bool skip_background, bool per_item,
                                 bool right_closed, double tolerance, const TensorView& sums, const TensorView& totals, int num_threads) {
        const Release release;
        return calibration_bins({shape, scores, labels, mask, n_bins, first_class, from_logits, class_wise, skip_background, per_item,
                                 right_closed, tolerance, static_cast<int64_t*>(sums.data), static_cast<int64_t*>(totals.data), nullptr},
                                num_threads);
    });

#if defined(CALSEG_CUDA_ARCHITECTURES)
    m.attr("CUDA_ARCHITECTURES") = py::str(CALSEG_CUDA_ARCHITECTURES).attr("split")(" ");
    m.def("cuda_calibration_bins", [](const Shape& shape, const TensorView& scores, const Labels& labels, const TensorView& mask,
                                      int64_t n_bins, int64_t first_class, bool from_logits, bool class_wise, bool skip_background,
                                      bool per_item, bool right_closed, double tolerance, const TensorView& sums, const TensorView& totals,
                                      const TensorView& faults, int device, uintptr_t stream) {
        const Release release;
        cuda_calibration_bins({shape, scores, labels, mask, n_bins, first_class, from_logits, class_wise, skip_background, per_item,
                               right_closed, tolerance, static_cast<int64_t*>(sums.data), static_cast<int64_t*>(totals.data), nullptr},
                              static_cast<int64_t*>(faults.data), device, reinterpret_cast<void*>(stream));
    });
#else
    m.attr("CUDA_ARCHITECTURES") = py::list();
#endif

    m.def("ace_moments", [](const Shape& shape, const TensorView& logits, const Labels& labels, int64_t n_bins, int64_t first_class,
                            bool soft, const TensorView& sums, const TensorView& nans, int num_threads) {
        const Release release;
        return ace_moments({shape,
                            logits,
                            labels,
                            n_bins,
                            first_class,
                            soft,
                            static_cast<int64_t*>(sums.data),
                            static_cast<int64_t*>(nans.data),
                            nullptr,
                            {}},
                           num_threads);
    });
    m.def("ace_moments_backward", [](const Shape& shape, const TensorView& logits, const Labels& labels, int64_t n_bins,
                                     int64_t first_class, bool soft, const TensorView& slopes, const TensorView& grad_logits,
                                     int num_threads) {
        const Release release;
        ace_moments_backward({shape, logits, labels, n_bins, first_class, soft, nullptr, nullptr, slopes.data, grad_logits}, num_threads);
    });

    m.def("empty_pooled", [](int dtype, const py::tuple& sizes, const py::tuple& strides) {
        return empty_pooled(static_cast<DType>(dtype), sizes, strides);
    });
    m.def("pool_trim", &pool_trim);
    m.def("pool_held_bytes", &pool_held_bytes);
    m.attr("POOLED_BYTES") = kPooledBytes;

    m.def("isa", &isa);
    m.def("available_isas", &available_isas);
    m.def("set_isa", &set_isa);
    m.def("threading_layer", &threading_layer);
    isa();  // a wrong CALSEG_ISA is an error at import, not in the middle of training
}

}  // namespace calseg
