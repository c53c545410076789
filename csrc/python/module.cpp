// The Python module calseg._native: registers every function of the engine that calseg calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <type_traits>

#include "cuda/plan.h"
#include "host/buffer_pool.h"
#include "host/dispatch.h"
#include "host/geometry.h"
#include "host/operations.h"
#include "host/parallel.h"
#include "python/launch_key.h"
#include "python/pooled_tensor.h"
#include "python/reader.h"

namespace py = pybind11;

namespace calseg {
namespace {

// Returns None, or of a label that is no class (position, number of classes).
py::object to_python(const LabelFault& fault, const Shape& shape) {
    if (fault.position < 0) return py::none();
    return py::make_tuple(fault.position, shape.C);
}

// Returns (label_position, score_position, total, least). Positions are -1 where there was no fault.
py::object to_python(const BinsFault& fault, const Shape&) {
    return py::make_tuple(fault.label_position, fault.score_position, fault.total, fault.least);
}

// Place of an argument: its name, and the members that lead to where it is read into.
template <auto... path>
struct In {
    const char* name;
    template <class Args>
    void read(Reader& reader, py::handle given, Args& args) const {
        reader.argument(name, given, (args.*....*path));
    }
};

// Place of a result, whose memory the caller gives.
template <auto... path>
struct Out {
    const char* name;
    template <class Args>
    void read(Reader& reader, py::handle given, Args& args) const {
        reader.result(name, given, (args.*....*path));
    }
};

int torch_num_threads() {
    static const py::handle get = py::module_::import("torch").attr("get_num_threads").cast<py::object>().release();
    return get().cast<int>();
}

template <class>
using Handle = py::handle;

// Registers an operation of the CPU. Python gives a tensor or a structure for each place, scores first, as the other
// tensors must fit them. A call on few elements takes microseconds: it keeps Python's lock.
template <class Args, class Result, class... Places>
void define(py::module_& module, const char* name, Result (*run)(Args&, int num_threads), Places... places) {
    module.def(name, [=](Handle<Places>... given) {
        Reader reader;
        Args args;
        (places.read(reader, given, args), ...);
        args.shape = reader.shape();
        const bool is_small = args.shape.voxels() * args.shape.C < kElementsPerThread;
        const int num_threads = is_small ? 1 : torch_num_threads();
        const auto call = [&] {
            std::optional<py::gil_scoped_release> release;
            if (!is_small) release.emplace();
            return run(args, num_threads);
        };
        if constexpr (std::is_void_v<Result>) call();
        else return to_python(call(), args.shape);
    });
}

// Place of a loss: a number for every voxel, or one for all of them.
struct LossResult {
    const char* name;
    void read(Reader& reader, py::handle given, LossArgs& args) const {
        if (args.spec.reduction == Reduction::none) reader.result(name, given, args.loss);
        else reader.result(name, given, args.reduced);
    }
};

template <Kernel<LossArgs> KernelTable::* kernel>
LabelFault run_loss(LossArgs& args, int num_threads) {
    return loss(kernels(scores_dtype(args)).*kernel, args, num_threads);
}

void define_operations(py::module_& m) {
    const auto define_loss = [&](const char* name, LabelFault (*run)(LossArgs&, int)) {
        define(m, name, run, In<&LossArgs::tensors>{"tensors"}, In<&LossArgs::spec>{"spec"}, Out<&LossArgs::gradients>{"gradients"},
               In<&LossArgs::upstream, &Upstream::grad_output>{"grad_output"}, LossResult{"loss"});
    };
#define CALSEG_DEFINE(name) define_loss(#name, &run_loss<&KernelTable::name>);
    CALSEG_LOSSES(CALSEG_DEFINE)
#undef CALSEG_DEFINE
    define(m, "loss_and_overlap", &loss_and_overlap, In<&LossArgs::tensors>{"tensors"}, In<&LossArgs::spec>{"spec"},
           Out<&LossArgs::gradients>{"made"}, LossResult{"loss"}, In<&LossArgs::overlap_sums>{"sums"}, In<&LossArgs::divisor>{"divisor"});
    define(m, "overlap_backward", &overlap_backward, In<&LossArgs::tensors>{"tensors"}, In<&LossArgs::spec>{"spec"},
           Out<&LossArgs::gradients>{"gradients"}, In<&LossArgs::overlap_slopes>{"grad_sums"});
    define(m, "sample_soft_labels", &sample_soft_labels, In<&SampleArgs::tensors>{"tensors"}, In<&SampleArgs::spec>{"spec"},
           Out<&SampleArgs::soft_labels>{"soft_labels"});
    define(m, "sample_soft_labels_backward", &sample_soft_labels_backward, In<&SampleArgs::tensors>{"tensors"},
           In<&SampleArgs::spec>{"spec"}, In<&SampleArgs::grad_output>{"grad_output"}, Out<&SampleArgs::gradients>{"gradients"});
    define(m, "accumulate_softmax", &accumulate_softmax, In<&AccumulateArgs::logits>{"logits"}, In<&AccumulateArgs::spec>{"spec"},
           Out<&AccumulateArgs::total>{"total"});
    define(m, "accumulate_softmax_backward", &accumulate_softmax_backward, In<&AccumulateArgs::logits>{"logits"},
           In<&AccumulateArgs::spec>{"spec"}, In<&AccumulateArgs::grad_output>{"grad_output"},
           Out<&AccumulateArgs::grad_logits>{"grad_logits"});
    define(m, "blend_soft_labels", &blend_soft_labels, Out<&BlendArgs::estimate>{"total"}, In<&BlendArgs::spec>{"spec"});
    define(m, "calibration_bins", &calibration_bins, In<&BinsArgs::scores>{"scores"}, In<&BinsArgs::spec>{"spec"},
           In<&BinsArgs::sums>{"sums"}, In<&BinsArgs::totals>{"totals"});
    define(m, "ace_moments", &ace_moments, In<&AceArgs::logits>{"logits"}, In<&AceArgs::spec>{"spec"}, In<&AceArgs::sums>{"sums"},
           In<&AceArgs::nans>{"nans"});
    define(m, "ace_moments_backward", &ace_moments_backward, In<&AceArgs::logits>{"logits"}, In<&AceArgs::spec>{"spec"},
           In<&AceArgs::slopes>{"slopes"}, Out<&AceArgs::grad_logits>{"grad_logits"});
}

#if defined(CALSEG_CUDA_ARCHITECTURES)
void cuda_calibration_bins(py::handle scores, py::handle spec, py::handle sums, py::handle totals, py::handle faults, int device,
                           uintptr_t stream) {
    Reader reader(Device::cuda);
    BinsArgs args;
    int64_t* places = nullptr;
    reader.argument("scores", scores, args.scores);
    reader.argument("spec", spec, args.spec);
    reader.argument("sums", sums, args.sums);
    reader.argument("totals", totals, args.totals);
    reader.argument("faults", faults, places);
    args.shape = reader.shape();
    const py::gil_scoped_release release;
    cuda_calibration_bins(args, places, device, reinterpret_cast<void*>(stream));
}

// Launches cross_entropy, whose caller gives memory for `blocks` partial sums of the losses and counts of voxels, or none. With
// `overlap`, it computes the sums of the overlap too, and with `slopes`, their gradient and that of the losses.
void cuda_cross_entropy(py::handle tensors, py::handle spec, py::handle gradients, py::handle grad_output, py::handle loss,
                        py::handle factor, py::handle divisor, py::handle partials, py::handle counts, py::handle overlap,
                        py::handle slopes, int64_t blocks, int device, uintptr_t stream) {
    Reader reader(Device::cuda);
    LossArgs args;
    const void *of_factor = nullptr, *of_divisor = nullptr;
    void *of_partials = nullptr, *of_counts = nullptr, *of_overlap = nullptr;
    reader.argument("tensors", tensors, args.tensors);
    reader.argument("spec", spec, args.spec);
    reader.result("gradients", gradients, args.gradients);
    reader.argument("grad_output", grad_output, args.upstream.grad_output);
    reader.result("loss", loss, args.loss);
    reader.argument("factor", factor, of_factor);
    reader.argument("divisor", divisor, of_divisor);
    reader.argument("partials", partials, of_partials);
    reader.argument("counts", counts, of_counts);
    reader.argument("overlap", overlap, of_overlap);
    reader.argument("slopes", slopes, args.overlap_slopes);
    args.shape = reader.shape();
    const Pass pass = of_overlap ? Pass::overlap : args.overlap_slopes ? Pass::overlap_gradient : Pass::loss;
    CrossEntropyLaunch launch = cross_entropy_launch(args, pass);
    if (launch.blocks() != blocks)
        throw std::invalid_argument("cross_entropy on CUDA: wanted " + std::to_string(launch.blocks()) + " blocks");
    launch.factor = static_cast<const float*>(of_factor);
    launch.divisor = static_cast<const float*>(of_divisor);
    launch.partials = static_cast<float*>(of_partials);
    launch.counts = static_cast<float*>(of_counts);
    launch.overlap = static_cast<float*>(of_overlap);
    const py::gil_scoped_release release;
    cuda_cross_entropy(launch, device, reinterpret_cast<void*>(stream));
}
#endif

// Returns (N, C, S, strides of the scores, strides of the voxels), with items merged where one stride walks them all. The
// strides of a tensor are (n, c, s). The Triton kernels walk tensors by these.
py::tuple geometry(const py::list& scores, const py::list& voxels) {
    Reader reader(Device::any);
    std::vector<TensorView> views;
    const auto add = [&](py::handle tensor, auto view) {
        reader.result("tensor", tensor, view);
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

// Returns the names of the fields of every structure that came from calseg/operations.py.
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

    define_operations(m);
#if defined(CALSEG_CUDA_ARCHITECTURES)
    m.attr("CUDA_ARCHITECTURES") = py::str(CALSEG_CUDA_ARCHITECTURES).attr("split")(" ");
    m.def("cuda_calibration_bins",
          static_cast<void (*)(py::handle, py::handle, py::handle, py::handle, py::handle, int, uintptr_t)>(&cuda_calibration_bins));
    m.def("cuda_cross_entropy",
          static_cast<void (*)(py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, py::handle,
                               py::handle, py::handle, int64_t, int, uintptr_t)>(&cuda_cross_entropy));
#else
    m.attr("CUDA_ARCHITECTURES") = py::list();
#endif

    m.def("geometry", &geometry);
    m.def("add_to_launch_key", &add_to_launch_key);

    m.def("empty_pooled", &empty_pooled);
    m.def("pool_trim", &pool_trim);
    m.def("pool_held_bytes", &pool_held_bytes);
    m.attr("POOLED_BYTES") = kPooledBytes;

    m.def("isa", &isa);
    m.def("available_isas", &available_isas);
    m.def("set_isa", &set_isa);
    m.def("threading_layer", &threading_layer);
    isa();  // Refuses a wrong CALSEG_ISA at import.
}

}  // namespace calseg
