// Reader of everything that comes from Python: tensors and the specs of calseg/operations.py. It reads torch.Tensors
// without libtorch, checks that their shapes fit each other, and copies those that the kernels cannot walk through.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "host/arguments.h"

namespace calseg {

// The error for a value that the engine does not read. It is thrown before anything is written.
struct Unreadable : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

struct Torch;

// Finds the kernels' number for a torch.dtype.
DType dtype_of(pybind11::handle dtype);

enum class Device { cpu, cuda, any };

class Reader {
 public:
    explicit Reader(Device device = Device::cpu);

    // Reads a spec, or tensors, by the fields of its structure. None leaves the structure as it is.
    template <class Structure>
    void read(pybind11::handle from, Structure& to) {
        if (from.is_none()) return;
        check_fields(from, to);
        visit_fields(to, [&](Py_ssize_t place, const char* name, auto& field) {
            name_ = name;
            read(pybind11::handle(PyTuple_GET_ITEM(from.ptr(), place)), field);
        });
    }
    void read(pybind11::handle from, Scores& to);
    void read(pybind11::handle from, Voxels& to);
    void read(pybind11::handle from, Indices& to);
    void read(pybind11::handle from, Classes& to);
    void read(pybind11::handle from, Reduction& to);
    void read(pybind11::handle from, double& to);
    void read(pybind11::handle from, int64_t& to);
    void read(pybind11::handle from, uint64_t& to);
    void read(pybind11::handle from, bool& to);

    // Reads the address of a contiguous tensor: of int64, of float64, or of the type that the scores are computed in.
    void read(pybind11::handle from, int64_t*& to);
    void read(pybind11::handle from, double*& to);
    void read(pybind11::handle from, const double*& to);
    void read(pybind11::handle from, const void*& to);
    void read(pybind11::handle from, void*& to);

    // Reads one argument of a call. Its name stands in front of error messages, unless a structure names its fields.
    template <class To>
    void argument(const char* name, pybind11::handle from, To& to) {
        name_ = name;
        read(from, to);
    }

    // Does the same for results, which are written to. They are not copied: a layout without one stride is an error.
    template <class To>
    void result(const char* name, pybind11::handle from, To& to) {
        is_result_ = true;
        argument(name, from, to);
        is_result_ = false;
    }

    // Returns the shape of the first scores that were read. All other tensors fit it.
    const Shape& shape() const;

 private:
    struct Layout;

    template <class Structure>
    void check_fields(pybind11::handle from, Structure& structure) {
        static PyTypeObject* known = nullptr;  // held for ever
        if (Py_TYPE(from.ptr()) == known) return;
        std::vector<std::string> names;
        visit_fields(structure, [&](Py_ssize_t place, const char* name, auto&) {
            names.resize(static_cast<std::size_t>(place));
            names.emplace_back(name);
        });
        check_names(from, name_of(&structure), names);
        known = Py_TYPE(from.ptr());
        Py_INCREF(reinterpret_cast<PyObject*>(known));
    }
    static void check_names(pybind11::handle from, const char* structure, const std::vector<std::string>& names);

    Layout layout_of(pybind11::handle tensor) const;
    bool read_dlpack(pybind11::handle tensor, Layout& to) const;
    void read_attributes(pybind11::handle tensor, Layout& to) const;
    bool has_memory(pybind11::handle tensor, const Layout& layout) const;
    void* memory(pybind11::handle from, DType dtype);
    void read_voxels(pybind11::handle from, TensorView& to, bool is_value);
    [[noreturn]] void refuse(const std::string& why) const;

    const Torch& torch_;
    Device device_;
    const char* name_ = "";  // of the field that is being read
    bool is_result_ = false;
    std::vector<int64_t> sizes_;  // of the scores
    bool has_shape_ = false;
    Shape shape_;
    DType dtype_ = DType::f32;            // of the scores
    std::vector<pybind11::object> held_;  // copies, until the call is done
};

}  // namespace calseg
