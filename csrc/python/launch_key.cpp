#include "python/launch_key.h"

#include <pybind11/gil_safe_call_once.h>

namespace calseg {

namespace py = pybind11;

namespace {

constexpr uintptr_t kMostAlign = 16;  // as in kernels/launch.py

py::handle tensor_type() {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> type;
    return type.call_once_and_store_result([] { return py::module_::import("torch").attr("Tensor").cast<py::object>(); }).get_stored();
}

void append(const py::list& key, PyObject* value) {
    if (!value || PyList_Append(key.ptr(), value) != 0) throw py::error_already_set();
}

void append_tensor(const py::list& key, py::handle tensor) {
    static PyObject* const dtype = PyUnicode_InternFromString("dtype");
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    append(key, py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), dtype)).ptr());
    const py::object address = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr));
    if (!address) throw py::error_already_set();
    append(key, reinterpret_cast<uintptr_t>(PyLong_AsVoidPtr(address.ptr())) % kMostAlign == 0 ? Py_True : Py_False);
    if (PyErr_Occurred()) throw py::error_already_set();
}

void append_all(const py::list& key, PyObject* tuple) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) {
        PyObject* const value = PyTuple_GET_ITEM(tuple, i);
        if (value == Py_None || PyLong_CheckExact(value)) {
            append(key, value);
        } else if (PyFloat_CheckExact(value)) {
            append(key, reinterpret_cast<PyObject*>(&PyFloat_Type));
        } else if (PyTuple_Check(value)) {
            append(key, py::int_(PyTuple_GET_SIZE(value)).ptr());
            append_all(key, value);
        } else if (const int is_tensor = PyObject_IsInstance(value, tensor_type().ptr())) {
            if (is_tensor < 0) throw py::error_already_set();
            append_tensor(key, value);
        } else {
            append(key, value);
        }
    }
}

}  // namespace

void add_to_launch_key(const py::tuple& arguments, const py::list& key) { append_all(key, arguments.ptr()); }

}  // namespace calseg
