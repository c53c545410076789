// Plain tuples of integers from Python: a tensor is (data_ptr, dtype, stride_n, stride_c, stride_s) or None.
#pragma once

#include <pybind11/pybind11.h>

#include "host/arguments.h"
#include "host/operations.h"

namespace pybind11::detail {

inline bool load_integers(handle source, long long* to, Py_ssize_t count) {
    if (!PyTuple_CheckExact(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != count) return false;
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* item = PyTuple_GET_ITEM(source.ptr(), i);
        if (!PyLong_Check(item)) return false;
        to[i] = static_cast<long long>(PyLong_AsUnsignedLongLongMask(item));
    }
    return true;
}

template <>
struct type_caster<calseg::TensorView> {
    PYBIND11_TYPE_CASTER(calseg::TensorView, const_name("TensorView | None"));
    bool load(handle source, bool) {
        if (source.is_none()) return true;
        long long v[5];
        if (!load_integers(source, v, 5)) return false;
        value = {reinterpret_cast<void*>(static_cast<intptr_t>(v[0])), static_cast<calseg::DType>(v[1]), v[2], v[3], v[4]};
        return true;
    }
};

template <>
struct type_caster<calseg::Shape> {
    PYBIND11_TYPE_CASTER(calseg::Shape, const_name("Shape"));
    bool load(handle source, bool) {
        long long v[3];
        if (!load_integers(source, v, 3)) return false;
        value = {v[0], v[1], v[2]};
        return true;
    }
};

// (labels, ignore_index, is_mask): is_mask where the labels only tell which voxels are ignored
template <>
struct type_caster<calseg::Labels> {
    PYBIND11_TYPE_CASTER(calseg::Labels, const_name("Labels | None"));
    bool load(handle source, bool convert) {
        if (source.is_none()) return true;
        if (!PyTuple_CheckExact(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 3) return false;
        type_caster<calseg::TensorView> view;
        if (!view.load(PyTuple_GET_ITEM(source.ptr(), 0), convert)) return false;
        value.view = static_cast<calseg::TensorView&>(view);
        value.ignore_index = PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), 1));
        value.is_mask = PyObject_IsTrue(PyTuple_GET_ITEM(source.ptr(), 2)) == 1;
        return !PyErr_Occurred();
    }
};

// (mu, logvar, temperature, beta, prior_mu, prior_logvar, num_samples, seed)
template <>
struct type_caster<calseg::Gaussian> {
    PYBIND11_TYPE_CASTER(calseg::Gaussian, const_name("Gaussian"));
    bool load(handle source, bool convert) {
        if (!PyTuple_CheckExact(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 8) return false;
        PyObject* const tuple = source.ptr();
        type_caster<calseg::TensorView> mu, logvar;
        if (!mu.load(PyTuple_GET_ITEM(tuple, 0), convert) || !logvar.load(PyTuple_GET_ITEM(tuple, 1), convert)) return false;
        value.mu = static_cast<calseg::TensorView&>(mu);
        value.logvar = static_cast<calseg::TensorView&>(logvar);
        value.temperature = PyFloat_AsDouble(PyTuple_GET_ITEM(tuple, 2));
        value.beta = PyFloat_AsDouble(PyTuple_GET_ITEM(tuple, 3));
        value.prior_mu = PyFloat_AsDouble(PyTuple_GET_ITEM(tuple, 4));
        value.prior_logvar = PyFloat_AsDouble(PyTuple_GET_ITEM(tuple, 5));
        value.num_samples = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, 6));
        value.seed = PyLong_AsUnsignedLongLongMask(PyTuple_GET_ITEM(tuple, 7));
        return !PyErr_Occurred();
    }
};

// (loss, bad_position, bad_value)
template <>
struct type_caster<calseg::Outcome> {
    PYBIND11_TYPE_CASTER(calseg::Outcome, const_name("tuple[float, int, int]"));
    static handle cast(const calseg::Outcome& outcome, return_value_policy, handle) {
        return make_tuple(outcome.loss, outcome.bad_position, outcome.bad_value).release();
    }
};

// (label_position, label, score_position, total, least)
template <>
struct type_caster<calseg::CalibrationFault> {
    PYBIND11_TYPE_CASTER(calseg::CalibrationFault, const_name("tuple[int, int, int, float, float]"));
    static handle cast(const calseg::CalibrationFault& fault, return_value_policy, handle) {
        return make_tuple(fault.label_position, fault.label, fault.score_position, fault.total, fault.least).release();
    }
};

}  // namespace pybind11::detail
