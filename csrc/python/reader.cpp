#include "python/reader.h"

#include <pybind11/gil_safe_call_once.h>

#include <algorithm>
#include <iterator>
#include <utility>

#include "python/dlpack.h"

namespace calseg {

namespace py = pybind11;

namespace {

constexpr int kMaxRank = 64;  // of a torch.Tensor

// The dtypes that the engine reads: the number that kernels know them by, PyTorch's name, DLPack's code and bits.
constexpr struct {
    DType dtype;
    const char* name;
    uint8_t code, bits;
} kDtypes[] = {{DType::f32, "float32", kDLFloat, 32},    {DType::i64, "int64", kDLInt, 64},     {DType::u8, "uint8", kDLUInt, 8},
               {DType::bf16, "bfloat16", kDLBfloat, 16}, {DType::f16, "float16", kDLFloat, 16}, {DType::i32, "int32", kDLInt, 32},
               {DType::i16, "int16", kDLInt, 16},        {DType::i8, "int8", kDLInt, 8},        {DType::f64, "float64", kDLFloat, 64},
               {DType::u16, "uint16", kDLUInt, 16},      {DType::u32, "uint32", kDLUInt, 32},   {DType::u64, "uint64", kDLUInt, 64}};

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

py::object call_method(py::handle of, PyObject* method) {
    PyObject* const self[] = {of.ptr()};
    return py::reinterpret_steal<py::object>(PyObject_VectorcallMethod(method, self, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
}

}  // namespace

// The objects of PyTorch and of Python that tensors are compared with and asked for. They live as long as the process.
struct Torch {
    PyObject *tensor, *parameter, *float64;
    int (*dltensor)(void* tensor, DLTensor* to) = nullptr;  // null before PyTorch 2.10
    std::vector<std::pair<PyObject*, DType>> dtypes;
    PyObject *shape = interned("shape"), *stride = interned("stride"), *data_ptr = interned("data_ptr"), *dtype = interned("dtype"),
             *is_cpu = interned("is_cpu"), *is_cuda = interned("is_cuda"), *is_neg = interned("is_neg"),
             *resolve_neg = interned("resolve_neg"), *contiguous = interned("contiguous"), *detach = interned("detach"),
             *to = interned("to"), *storage_offset = interned("storage_offset");

    Torch() {
        const py::module_ torch = py::module_::import("torch");
        const auto get = [](py::handle from, const char* name) { return from.attr(name).cast<py::object>().release().ptr(); };
        tensor = get(torch, "Tensor");
        parameter = get(py::module_::import("torch.nn"), "Parameter");
        float64 = get(torch, "float64");
        for (const auto& known : kDtypes) dtypes.emplace_back(get(torch, known.name), known.dtype);
        const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
        if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
            const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
            if (api->major == 1) dltensor = api->dltensor_from_py_object;
        }
    }

    static const Torch& get() {
        PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Torch> torch;
        return torch.call_once_and_store_result([] { return Torch(); }).get_stored();
    }
};

struct Reader::Layout {
    void* data = nullptr;
    DType dtype = DType::f32;
    int rank = 0;
    int64_t elements = 1;
    int64_t sizes[kMaxRank], strides[kMaxRank];

    // Finds the stride that walks the axes from `first` on in row-major order. False where there is none.
    bool walk(int first, int64_t& step) const {
        bool any = false;
        int64_t extent = 0;
        step = 1;
        for (int i = rank - 1; i >= first; --i) {
            if (sizes[i] == 1) continue;
            if (!any) step = strides[i];
            else if (strides[i] != extent) return false;
            any = true;
            extent = strides[i] * sizes[i];
        }
        return true;
    }
};

Reader::Reader(Device device) : torch_(Torch::get()), device_(device) {}

void Reader::refuse(const std::string& why) const {
    PyErr_Clear();
    throw Unreadable(std::string(name_) + ": " + why);
}

void Reader::check_names(py::handle from, const char* structure, const std::vector<std::string>& names) {
    const py::object fields = py::getattr(from, "_fields", py::none());
    bool same = PyTuple_Check(from.ptr()) && PyTuple_Check(fields.ptr());
    for (std::size_t i = 0; same && i < names.size(); ++i)
        same = names[i].empty() ||
               (static_cast<Py_ssize_t>(i) < PyTuple_GET_SIZE(fields.ptr()) &&
                PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(fields.ptr(), static_cast<Py_ssize_t>(i)), names[i].c_str()) == 0);
    if (!same)
        throw py::type_error(std::string("calseg._native was built from another calseg/operations.py: the fields of ") + structure +
                             " differ; build it again");
}

DType dtype_of(py::handle dtype) {
    for (const auto& [object, code] : Torch::get().dtypes)
        if (object == dtype.ptr()) return code;
    PyErr_Clear();
    throw Unreadable("got a dtype that the engine does not read");
}

// ---- tensors ----

namespace {

Device device_of(const DLDevice& device) {
    if (device.device_type == kDLCPU || device.device_type == kDLCUDAHost) return Device::cpu;
    return device.device_type == kDLCUDA ? Device::cuda : Device::any;
}

}  // namespace

// Reads a tensor by DLPack's C function, in 50 ns. False where PyTorch has none, or it refuses the tensor.
bool Reader::read_dlpack(py::handle tensor, Layout& to) const {
    DLTensor from;
    if (!torch_.dltensor) return false;
    if (torch_.dltensor(tensor.ptr(), &from) != 0) {
        PyErr_Clear();
        return false;
    }
    const auto same = [&](const auto& known) { return known.code == from.dtype.code && known.bits == from.dtype.bits; };
    const auto* known = std::find_if(std::begin(kDtypes), std::end(kDtypes), same);
    if (known == std::end(kDtypes) || from.dtype.lanes != 1 || from.ndim > kMaxRank || !from.strides) return false;
    if (device_ != Device::any && device_of(from.device) != device_) return false;
    to.dtype = known->dtype;
    to.data = from.data;
    to.rank = from.ndim;
    std::copy(from.shape, from.shape + to.rank, to.sizes);
    std::copy(from.strides, from.strides + to.rank, to.strides);
    return true;
}

// Reads a tensor by its attributes in Python, in every PyTorch. Refuses a tensor with the reason.
void Reader::read_attributes(py::handle tensor, Layout& to) const {
    const auto attribute = [&](PyObject* name) { return py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), name)); };
    if (device_ != Device::any) {
        const py::object here = attribute(device_ == Device::cpu ? torch_.is_cpu : torch_.is_cuda);
        if (here.ptr() != Py_True) refuse(device_ == Device::cpu ? "wanted a tensor on the CPU" : "wanted a tensor on a CUDA device");
    }
    to.dtype = dtype_of(attribute(torch_.dtype));

    const auto integers = [&](const py::object& tuple, int64_t* to) {
        if (!tuple || !PyTuple_Check(tuple.ptr()) || PyTuple_GET_SIZE(tuple.ptr()) > kMaxRank) refuse("wanted a dense tensor");
        const int count = static_cast<int>(PyTuple_GET_SIZE(tuple.ptr()));
        for (int i = 0; i < count; ++i) {
            PyObject* const item = PyTuple_GET_ITEM(tuple.ptr(), i);
            if (!PyLong_Check(item)) refuse("wanted a tensor of known size");
            to[i] = PyLong_AsLongLong(item);
        }
        return count;
    };
    to.rank = integers(attribute(torch_.shape), to.sizes);
    if (integers(call_method(tensor, torch_.stride), to.strides) != to.rank) refuse("wanted a dense tensor");
    const py::object address = call_method(tensor, torch_.data_ptr);
    if (!address || !PyLong_Check(address.ptr())) refuse("got a tensor without memory of its own (fake, or of a wrapper)");
    to.data = PyLong_AsVoidPtr(address.ptr());
}

Reader::Layout Reader::layout_of(py::handle tensor) const {
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
    const bool is_plain = type == torch_.tensor || type == torch_.parameter;
    if (!is_plain && PyObject_IsInstance(tensor.ptr(), torch_.tensor) != 1) refuse("got no torch.Tensor, wanted one");
    Layout layout;
    if (!is_plain || !read_dlpack(tensor, layout)) read_attributes(tensor, layout);
    for (int i = 0; i < layout.rank; ++i) layout.elements *= layout.sizes[i];
    if (layout.elements > 0 && !has_memory(tensor, layout)) refuse("got a tensor whose memory is not there (fake, freed, or of a wrapper)");
    static char nothing;
    if (!layout.data) layout.data = &nothing;  // An empty tensor is read like any other.
    return layout;
}

// Tells whether there is memory at the address. That of a view on freed memory is null plus the view's offset.
bool Reader::has_memory(py::handle tensor, const Layout& layout) const {
    const auto address = reinterpret_cast<uintptr_t>(layout.data);
    constexpr uintptr_t kSurelyMemory = uintptr_t(1) << 40;  // no view begins a tebibyte into its storage
    if (address >= kSurelyMemory) return true;
    if (address == 0) return false;
    const py::object offset = call_method(tensor, torch_.storage_offset);
    if (!offset || !PyLong_Check(offset.ptr())) {
        PyErr_Clear();
        return true;
    }
    const auto* known = std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](const auto& each) { return each.dtype == layout.dtype; });
    return address != static_cast<uintptr_t>(PyLong_AsLongLong(offset.ptr()) * (known->bits / 8));
}

// Reads a tensor by find(tensor). Where that is false, as no stride walks through the tensor, and where PyTorch only
// notes that the numbers are to be negated, a copy is read instead. Results are memory that calseg made itself.
template <class Find>
static void view(py::handle from, const Torch& torch, std::vector<py::object>& held, bool is_result, const Find& find) {
    const bool is_walkable = find(from);
    if (is_walkable && (is_result || call_method(from, torch.is_neg).ptr() != Py_True)) return;
    if (is_result) throw Unreadable("a result has a layout that cannot be written in place");
    py::object copy = call_method(from, torch.resolve_neg);
    if (!copy) throw py::error_already_set();
    if (!find(copy)) {
        copy = call_method(copy, torch.contiguous);
        if (!copy) throw py::error_already_set();
        find(copy);
    }
    held.push_back(std::move(copy));
}

void Reader::read(py::handle from, Scores& to) {
    if (from.is_none()) return;
    view(from, torch_, held_, is_result_, [&](py::handle tensor) {
        const Layout t = layout_of(tensor);
        if (t.rank == 0) refuse("wanted a class axis");
        const bool is_first = !has_shape_;
        if (is_first) {
            sizes_.assign(t.sizes, t.sizes + t.rank);
            shape_ = {1, t.sizes[t.rank > 1], 1};
            if (t.rank == 2) shape_.S = t.sizes[0];
            if (t.rank > 2) {
                shape_.N = t.sizes[0];
                for (int i = 2; i < t.rank; ++i) shape_.S *= t.sizes[i];
            }
            dtype_ = t.dtype;
            if (shape_.C == 0) refuse("wanted at least one class");
            has_shape_ = true;
        } else if (sizes_.size() != static_cast<std::size_t>(t.rank) || !std::equal(sizes_.begin(), sizes_.end(), t.sizes)) {
            refuse("wanted the shape of the other scores");
        }
        // Soft labels may be fractions of the largest integer. The first scores are logits.
        const bool is_fraction = (t.dtype == DType::u8 || t.dtype == DType::u16) && !is_first;
        if (t.dtype > DType::f16 && !is_fraction) refuse("wanted floating-point numbers");
        to.data = t.data;
        to.dtype = t.dtype;
        to.stride_n = 0;
        to.stride_c = t.strides[t.rank > 1];
        to.stride_s = 1;
        if (t.rank == 2) to.stride_s = t.strides[0];
        if (t.rank <= 2) return true;
        to.stride_n = t.strides[0];
        return t.walk(2, to.stride_s);
    });
}

void Reader::read(py::handle from, Voxels& to) { read_voxels(from, to, true); }
void Reader::read(py::handle from, Indices& to) { read_voxels(from, to, false); }

void Reader::read_voxels(py::handle from, TensorView& to, bool is_value) {
    if (from.is_none()) return;
    view(from, torch_, held_, is_result_, [&](py::handle tensor) {
        const Layout t = layout_of(tensor);
        bool fits = has_shape_ && sizes_.size() == static_cast<std::size_t>(t.rank) + 1;
        for (int i = 0; fits && i < t.rank; ++i) fits = t.sizes[i] == sizes_[static_cast<std::size_t>(i == 0 ? 0 : i + 1)];
        if (!fits) refuse("wanted the shape of the scores without their class axis");
        if (is_value && t.dtype > DType::f16) refuse("wanted floating-point numbers");
        to.data = t.data;
        to.dtype = t.dtype;
        to.stride_n = to.stride_c = 0;
        to.stride_s = 1;
        if (t.rank == 1) to.stride_s = t.strides[0];
        if (t.rank <= 1) return true;
        to.stride_n = t.strides[0];
        return t.walk(1, to.stride_s);
    });
}

void Reader::read(py::handle from, Classes& to) {
    if (from.is_none()) return;
    const py::object plain = call_method(from, torch_.detach);
    PyObject* const arguments[] = {plain.ptr(), torch_.float64};
    py::object wide;
    if (plain) wide = py::reinterpret_steal<py::object>(PyObject_VectorcallMethod(torch_.to, arguments, 2, nullptr));
    if (wide) wide = call_method(wide, torch_.resolve_neg);
    if (wide) wide = call_method(wide, torch_.contiguous);
    if (!wide) refuse("wanted a tensor of numbers");
    const Layout t = layout_of(wide);
    if (!has_shape_ || t.rank != 1 || t.sizes[0] != shape_.C) refuse("wanted one number for each class");
    to.data = static_cast<const double*>(t.data);
    held_.push_back(wide);
}

void Reader::read(py::handle from, int64_t*& to) { to = static_cast<int64_t*>(memory(from, DType::i64)); }

void Reader::read(py::handle from, double*& to) { to = static_cast<double*>(memory(from, DType::f64)); }

void Reader::read(py::handle from, const double*& to) { to = static_cast<const double*>(memory(from, DType::f64)); }

void Reader::read(py::handle from, void*& to) { to = memory(from, dtype_ == DType::f64 ? DType::f64 : DType::f32); }

void Reader::read(py::handle from, const void*& to) {
    void* memory = nullptr;
    read(from, memory);
    to = memory;
}

void* Reader::memory(py::handle from, DType dtype) {
    if (from.is_none()) return nullptr;
    const Layout t = layout_of(from);
    int64_t step = 1;
    if (t.elements > 1 && (!t.walk(0, step) || step != 1)) refuse("wanted contiguous memory");
    if (t.dtype != dtype) refuse("wanted another dtype");
    return t.data;
}

const Shape& Reader::shape() const {
    if (!has_shape_) refuse("wanted scores");
    return shape_;
}

// ---- numbers ----

void Reader::read(py::handle from, Reduction& to) {
    const char* const names[] = {"none", "mean", "sum"};
    if (PyUnicode_Check(from.ptr()))
        for (int i = 0; i < 3; ++i)
            if (PyUnicode_CompareWithASCIIString(from.ptr(), names[i]) == 0) {
                to = static_cast<Reduction>(i);
                return;
            }
    refuse("wanted 'none', 'mean' or 'sum'");
}

void Reader::read(py::handle from, double& to) {
    to = PyFloat_AsDouble(from.ptr());
    if (to == -1.0 && PyErr_Occurred()) refuse("wanted a number");
}

void Reader::read(py::handle from, int64_t& to) {
    to = PyLong_AsLongLong(from.ptr());
    if (to == -1 && PyErr_Occurred()) refuse("wanted an integer of 64 bits");
}

void Reader::read(py::handle from, uint64_t& to) {
    const py::object number = py::reinterpret_steal<py::object>(PyNumber_Index(from.ptr()));  // a 0-d tensor's too
    if (number) to = PyLong_AsUnsignedLongLongMask(number.ptr());
    if (PyErr_Occurred()) refuse("wanted an integer of 64 bits");
}

void Reader::read(py::handle from, bool& to) {
    const int truth = PyObject_IsTrue(from.ptr());
    if (truth < 0) refuse("wanted True or False");
    to = truth == 1;
}

}  // namespace calseg
