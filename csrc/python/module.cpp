// The Python module calseg._native: what calseg calls of the engine, by name.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/plan.h"
#include "host/buffer_pool.h"
#include "host/dispatch.h"
#include "host/geometry.h"
#include "host/operations.h"
#include "host/parallel.h"
#include "python/pooled_tensor.h"
#include "python/reader.h"

namespace py = pybind11;

namespace calseg {
namespace {

using Release = py::gil_scoped_release;

// (loss, bad_position, bad_value, number of classes)
py::tuple to_python(const Outcome& outcome, const Shape& shape) {
    return py::make_tuple(outcome.loss, outcome.bad_position, outcome.bad_value, shape.C);
}

// (label_position, label, score_position, total, least)
py::tuple to_python(const BinsFault& fault) {
    return py::make_tuple(fault.label_position, fault.label, fault.score_position, fault.total, fault.least);
}

template <Kernel<LossArgs> KernelTable::* kernel>
py::tuple call_loss(py::handle spec, py::handle tensors, py::handle gradients, py::handle grad_output, py::handle value, int num_threads) {
    Reader reader;
    LossArgs args;
    reader.read(tensors, args.tensors);
    reader.read(spec, args.spec);
    reader.write(gradients, args.gradients);
    reader.read(grad_output, args.upstream.grad_output);
    reader.write(value, args.loss);
    args.shape = reader.shape();
    Outcome outcome;
    {
        const Release release;
        outcome = loss(kernels().*kernel, args, num_threads);
    }
    return to_python(outcome, args.shape);
}

py::tuple call_sample_soft_labels(py::handle spec, py::handle tensors, py::handle soft_labels, int num_threads) {
    Reader reader;
    SampleArgs args;
    reader.read(tensors, args.tensors);
    reader.read(spec, args.spec);
    reader.write(soft_labels, args.soft_labels);
    args.shape = reader.shape();
    Outcome outcome;
    {
        const Release release;
        outcome = sample_soft_labels(args, num_threads);
    }
    return to_python(outcome, args.shape);
}

void call_sample_soft_labels_backward(py::handle spec, py::handle tensors, py::handle grad_output, py::handle gradients, int num_threads) {
    Reader reader;
    SampleArgs args;
    reader.read(tensors, args.tensors);
    reader.read(spec, args.spec);
    reader.read(grad_output, args.grad_output);
    reader.write(gradients, args.gradients);
    args.shape = reader.shape();
    const Release release;
    sample_soft_labels_backward(args, num_threads);
}

void call_accumulate_softmax(py::handle spec, py::handle total, py::handle logits, int num_threads) {
    Reader reader;
    AccumulateArgs args;
    reader.read(logits, args.logits);
    reader.read(spec, args.spec);
    reader.write(total, args.total);
    args.shape = reader.shape();
    const Release release;
    accumulate_softmax(args, num_threads);
}

void call_accumulate_softmax_backward(py::handle spec, py::handle logits, py::handle grad_output, py::handle grad_logits, int num_threads) {
    Reader reader;
    AccumulateArgs args;
    reader.read(logits, args.logits);
    reader.read(spec, args.spec);
    reader.read(grad_output, args.grad_output);
    reader.write(grad_logits, args.grad_logits);
    args.shape = reader.shape();
    const Release release;
    accumulate_softmax_backward(args, num_threads);
}

py::tuple call_blend_soft_labels(py::handle spec, py::handle estimate, int num_threads) {
    Reader reader;
    BlendArgs args;
    reader.write(estimate, args.estimate);
    reader.read(spec, args.spec);
    args.shape = reader.shape();
    Outcome outcome;
    {
        const Release release;
        outcome = blend_soft_labels(args, num_threads);
    }
    return to_python(outcome, args.shape);
}

void read_bins(Reader& reader, BinsArgs& args, py::handle spec, py::handle scores, py::handle sums, py::handle totals) {
    reader.read(scores, args.scores);
    reader.read(spec, args.spec);
    args.sums = static_cast<int64_t*>(reader.memory(sums, "int64"));
    args.totals = static_cast<int64_t*>(reader.memory(totals, "int64"));
    args.shape = reader.shape();
}

py::tuple call_calibration_bins(py::handle spec, py::handle scores, py::handle sums, py::handle totals, int num_threads) {
    Reader reader;
    BinsArgs args;
    read_bins(reader, args, spec, scores, sums, totals);
    BinsFault fault;
    {
        const Release release;
        fault = calibration_bins(args, num_threads);
    }
    return to_python(fault);
}

#if defined(CALSEG_CUDA_ARCHITECTURES)
void call_cuda_calibration_bins(py::handle spec, py::handle scores, py::handle sums, py::handle totals, py::handle faults, int device,
                                uintptr_t stream) {
    Reader reader(Device::cuda);
    BinsArgs args;
    read_bins(reader, args, spec, scores, sums, totals);
    auto* const places = static_cast<int64_t*>(reader.memory(faults, "int64"));
    const Release release;
    cuda_calibration_bins(args, places, device, reinterpret_cast<void*>(stream));
}
#endif

py::tuple call_ace_moments(py::handle spec, py::handle logits, py::handle sums, py::handle nans, int num_threads) {
    Reader reader;
    AceArgs args;
    reader.read(logits, args.logits);
    reader.read(spec, args.spec);
    args.sums = static_cast<int64_t*>(reader.memory(sums, "int64"));
    args.nans = static_cast<int64_t*>(reader.memory(nans, "int64"));
    args.shape = reader.shape();
    Outcome outcome;
    {
        const Release release;
        outcome = ace_moments(args, num_threads);
    }
    return to_python(outcome, args.shape);
}

void call_ace_moments_backward(py::handle spec, py::handle logits, py::handle slopes, py::handle grad_logits, int num_threads) {
    Reader reader;
    AceArgs args;
    reader.read(logits, args.logits);
    reader.read(spec, args.spec);
    args.slopes = reader.memory(slopes, args.logits.dtype == DType::f64 ? "float64" : "float32");
    reader.write(grad_logits, args.grad_logits);
    args.shape = reader.shape();
    const Release release;
    ace_moments_backward(args, num_threads);
}

// (N, C, S, [(n, c, s) of the scores], [(n, 0, s) of the voxels]): how a GPU's kernels walk these tensors, merged items first.
py::tuple geometry(const py::list& scores, const py::list& voxels) {
    Reader reader(Device::any);
    std::vector<TensorView> views;
    const auto add = [&](py::handle tensor, auto view) {
        reader.write(tensor, view);
        views.push_back(view);
    };
    for (const py::handle tensor : scores) add(tensor, Scores());
    for (const py::handle tensor : voxels)
        if (py::cast<bool>(tensor.attr("is_floating_point")())) add(tensor, Voxels());
        else add(tensor, Indices());
    std::vector<TensorView*> places;
    for (TensorView& view : views) places.push_back(&view);
    Shape shape = reader.shape();
    merge_items(shape, places.data(), static_cast<int>(places.size()));
    py::list strides[2];
    for (std::size_t i = 0; i < views.size(); ++i)
        strides[i >= scores.size()].append(py::make_tuple(views[i].stride_n, views[i].stride_c, views[i].stride_s));
    return py::make_tuple(shape.N, shape.C, shape.S, strides[0], strides[1]);
}

// The fields of every structure that came from calseg/operations.py, by its name.
template <class... Structures>
py::dict fields_of(std::tuple<Structures...>*) {
    py::dict all;
    const auto add = [&](auto structure) {
        py::list names;
        visit_fields(structure, [&](Py_ssize_t, const char* name, auto&) { names.append(name); });
        all[name_of(&structure)] = names;
    };
    (add(Structures()), ...);
    return all;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "CPU and CUDA kernels of calseg";
    py::register_exception<Unreadable>(m, "Unreadable", PyExc_ValueError);
    m.attr("FIELDS") = fields_of(static_cast<Structures*>(nullptr));

#define CALSEG_REGISTER(name) m.def(#name, &call_loss<&KernelTable::name>);
    CALSEG_LOSSES(CALSEG_REGISTER)
#undef CALSEG_REGISTER
    m.def("sample_soft_labels", &call_sample_soft_labels);
    m.def("sample_soft_labels_backward", &call_sample_soft_labels_backward);
    m.def("accumulate_softmax", &call_accumulate_softmax);
    m.def("accumulate_softmax_backward", &call_accumulate_softmax_backward);
    m.def("blend_soft_labels", &call_blend_soft_labels);
    m.def("calibration_bins", &call_calibration_bins);
    m.def("ace_moments", &call_ace_moments);
    m.def("ace_moments_backward", &call_ace_moments_backward);

#if defined(CALSEG_CUDA_ARCHITECTURES)
    m.attr("CUDA_ARCHITECTURES") = py::str(CALSEG_CUDA_ARCHITECTURES).attr("split")(" ");
    m.def("cuda_calibration_bins", &call_cuda_calibration_bins);
#else
    m.attr("CUDA_ARCHITECTURES") = py::list();
#endif

    m.def("geometry", &geometry);

    m.def("empty_pooled", &empty_pooled);
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
