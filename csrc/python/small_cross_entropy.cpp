#include "python/small_cross_entropy.h"

#include <pybind11/gil_safe_call_once.h>

#include <array>
#include <utility>

#include "host/buffer_pool.h"
#include "host/operations.h"

namespace calseg {
namespace {

namespace py = pybind11;

constexpr int kMaxRank = 8;

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

// What of PyTorch is compared with and called; held for ever.
struct Torch {
    PyObject *tensor_type, *empty_like;
    std::array<std::pair<PyObject*, DType>, 10> dtypes;
    PyObject *shape = interned("shape"), *stride = interned("stride"), *data_ptr = interned("data_ptr"), *dtype = interned("dtype"),
             *is_cpu = interned("is_cpu"), *is_neg = interned("is_neg"), *requires_grad = interned("requires_grad");

    Torch() {
        const py::module_ torch = py::module_::import("torch");
        const auto get = [&](const char* name) { return torch.attr(name).cast<py::object>().release().ptr(); };
        tensor_type = get("Tensor");
        empty_like = get("empty_like");
        dtypes = {{{get("int64"), DType::i64},
                   {get("float32"), DType::f32},
                   {get("uint8"), DType::u8},
                   {get("int32"), DType::i32},
                   {get("int16"), DType::i16},
                   {get("int8"), DType::i8},
                   {get("float64"), DType::f64},
                   {get("uint16"), DType::u16},
                   {get("uint32"), DType::u32},
                   {get("uint64"), DType::u64}}};
    }

    static const Torch& get() {
        PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Torch> torch;
        return torch.call_once_and_store_result([] { return Torch(); }).get_stored();
    }
};

// A tensor's attributes; a Python error (it has none such: it is sparse, say) counts as "not ordinary".
class Reader {
 public:
    Reader(const Torch& torch, PyObject* tensor) : torch_(torch), tensor_(tensor) {}

    bool is_true(PyObject* attribute) const { return is_true(get(attribute)); }
    bool is_true_of_call(PyObject* method) const { return is_true(call(method)); }

    bool integers(const py::object& tuple, int64_t* to, int& count) const {
        if (!tuple || !PyTuple_Check(tuple.ptr()) || PyTuple_GET_SIZE(tuple.ptr()) > kMaxRank) return false;
        count = static_cast<int>(PyTuple_GET_SIZE(tuple.ptr()));
        for (int i = 0; i < count; ++i) {
            to[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
            if (to[i] == -1 && PyErr_Occurred()) return failed();
        }
        return true;
    }

    py::object get(PyObject* attribute) const { return checked(PyObject_GetAttr(tensor_, attribute)); }
    py::object call(PyObject* method) const {
        PyObject* const self[] = {tensor_};
        return checked(PyObject_VectorcallMethod(method, self, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
    }

 private:
    static bool failed() {
        PyErr_Clear();
        return false;
    }
    static py::object checked(PyObject* result) {
        if (!result) PyErr_Clear();
        return py::reinterpret_steal<py::object>(result);
    }
    static bool is_true(const py::object& value) { return value.ptr() == Py_True; }

    const Torch& torch_;
    PyObject* tensor_;
};

struct Dense {
    void* data;
    DType dtype;
    int rank;
    int64_t sizes[kMaxRank], strides[kMaxRank];

    // A dense tensor on the CPU of a known dtype, and no subclass, which may read itself in a way of its own.
    bool read(const Torch& torch, PyObject* tensor) {
        if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != torch.tensor_type) return false;
        const Reader from(torch, tensor);
        if (!from.is_true(torch.is_cpu) || from.is_true_of_call(torch.is_neg)) return false;
        const py::object of_dtype = from.get(torch.dtype);
        bool known = false;
        for (const auto& [object, code] : torch.dtypes)
            if (object == of_dtype.ptr()) known = true, dtype = code;
        int of_strides = 0;
        if (!known || !from.integers(from.get(torch.shape), sizes, rank) || !from.integers(from.call(torch.stride), strides, of_strides))
            return false;
        const py::object address = from.call(torch.data_ptr);
        data = address ? PyLong_AsVoidPtr(address.ptr()) : nullptr;
        return data && of_strides == rank;
    }

    // The stride with which the axes from `first` on are walked in row-major order, if there is one.
    bool walk(int first, int64_t& step) const {
        int64_t extent = 0;  // no axis yet
        step = 1;
        for (int i = rank - 1; i >= first; --i) {
            if (sizes[i] == 1) continue;
            if (extent == 0) step = strides[i];
            else if (strides[i] != extent) return false;
            extent = strides[i] * sizes[i];
        }
        return true;
    }
};

// [C], [N, C] or [N, C, *S]; rows of [N, C] count as one item's voxels
bool view_scores(const Dense& t, TensorView& view) {
    view = {t.data, t.dtype, 0, t.strides[t.rank > 1], 1};
    if (t.rank == 2) view.stride_s = t.strides[0];
    if (t.rank <= 2) return true;
    view.stride_n = t.strides[0];
    return t.walk(2, view.stride_s);
}

// [], [N] or [N, *S]
bool view_labels(const Dense& t, TensorView& view) {
    view = {t.data, t.dtype, 0, 0, 1};
    if (t.rank == 1) view.stride_s = t.strides[0];
    if (t.rank <= 1) return true;
    view.stride_n = t.strides[0];
    return t.walk(1, view.stride_s);
}

Shape shape_of(const Dense& t) {
    if (t.rank == 1) return {1, t.sizes[0], 1};
    if (t.rank == 2) return {1, t.sizes[1], t.sizes[0]};
    int64_t S = 1;
    for (int i = 2; i < t.rank; ++i) S *= t.sizes[i];
    return {t.sizes[0], t.sizes[1], S};
}

bool fits(const Dense& labels, const Dense& scores) {
    if (labels.rank != scores.rank - 1) return false;
    for (int i = 0; i < labels.rank; ++i)
        if (labels.sizes[i] != scores.sizes[i == 0 ? 0 : i + 1]) return false;
    return true;
}

bool is_float(DType dtype) { return dtype == DType::f32 || dtype == DType::f64; }

bool read_reduction(PyObject* given, Reduction& reduction) {
    if (!PyUnicode_Check(given)) return false;
    if (PyUnicode_CompareWithASCIIString(given, "mean") == 0) reduction = Reduction::mean;
    else if (PyUnicode_CompareWithASCIIString(given, "sum") == 0) reduction = Reduction::sum;
    else return false;
    return true;
}

bool read_index(PyObject* given, int64_t& index) {
    if (!PyLong_CheckExact(given)) return false;
    int overflow = 0;
    index = PyLong_AsLongLongAndOverflow(given, &overflow);
    return !overflow;
}

}  // namespace

py::object small_cross_entropy(py::handle logits, py::handle target, py::handle ignore_index, py::handle reduction,
                               py::handle label_smoothing, bool with_gradient, int num_threads) {
    const Torch& torch = Torch::get();
    const py::none not_here;
    Dense scores, labels, gradient;
    CrossEntropyArgs args;
    Reduction how;
    if (!read_reduction(reduction.ptr(), how) || !read_index(ignore_index.ptr(), args.labels.ignore_index)) return not_here;
    if (!PyFloat_CheckExact(label_smoothing.ptr())) return not_here;
    args.label_smoothing = PyFloat_AS_DOUBLE(label_smoothing.ptr());
    if (!(args.label_smoothing >= 0.0 && args.label_smoothing <= 1.0)) return not_here;
    if (!scores.read(torch, logits.ptr()) || !labels.read(torch, target.ptr())) return not_here;
    if (!is_float(scores.dtype) || is_float(labels.dtype) || scores.rank == 0 || !fits(labels, scores)) return not_here;
    args.shape = shape_of(scores);
    const int64_t elements = args.shape.voxels() * args.shape.C, bytes = elements * (scores.dtype == DType::f64 ? 8 : 4);
    if (elements == 0 || bytes >= static_cast<int64_t>(kPooledBytes)) return not_here;
    if (!view_scores(scores, args.logits) || !view_labels(labels, args.labels.view)) return not_here;

    py::object to = not_here;
    if (with_gradient && Reader(torch, logits.ptr()).is_true(torch.requires_grad)) {
        to = py::reinterpret_steal<py::object>(PyObject_CallOneArg(torch.empty_like, logits.ptr()));
        if (!to) throw py::error_already_set();
        if (!gradient.read(torch, to.ptr()) || !view_scores(gradient, args.grad_logits)) return not_here;
    }
    Outcome outcome;
    {
        const py::gil_scoped_release release;
        outcome = cross_entropy(args, how, num_threads);
    }
    if (outcome.bad_position >= 0) return not_here;
    return py::make_tuple(outcome.loss, std::move(to));
}

}  // namespace calseg
