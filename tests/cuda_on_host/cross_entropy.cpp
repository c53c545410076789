// Interface of the kernels of cross-entropy on a CPU for tests/backends/cuda_cross_entropy.py: functions of plain numbers.
#include "../../kernels/cross_entropy_few.cu"
#include "../../kernels/cross_entropy_rows.cu"
#include "../../kernels/overlap_few.cu"
#include "../../kernels/overlap_tiles.cu"

#include "../../csrc/cuda/plan.cpp"
#include "views.h"

namespace {

// Arguments of a call:
//   shape                                         [N, C, S]
//   logits, gradient, labels, grad_output, loss   [data, dtype, stride_n, stride_c, stride_s] or null
struct Call {
    const int64_t *shape, *logits, *gradient, *labels, *grad_output, *loss;
    const double* weight;
    const float *factor, *divisor;
    float *partials, *counts, *overlap;
    const double* slopes;
    int64_t ignore_index;
    double scale, label_smoothing;

    calseg::CrossEntropyLaunch launch() const {
        calseg::LossArgs a;
        a.shape = {shape[0], shape[1], shape[2]};
        read_view(logits, a.tensors.logits);
        read_view(gradient, a.gradients.logits);
        read_view(labels, a.spec.labels.tensor);
        read_view(grad_output, a.upstream.grad_output);
        read_view(loss, a.loss);
        a.spec.weight.data = weight, a.spec.labels.ignore_index = ignore_index;
        a.spec.scale = scale, a.spec.label_smoothing = label_smoothing;
        a.overlap_slopes = slopes;
        const calseg::Pass pass = overlap ? calseg::Pass::overlap : slopes ? calseg::Pass::overlap_gradient : calseg::Pass::loss;
        calseg::CrossEntropyLaunch launch = calseg::cross_entropy_launch(a, pass);
        launch.factor = factor, launch.divisor = divisor;
        launch.partials = partials, launch.counts = counts, launch.overlap = overlap;
        return launch;
    }
};

std::string error;

}  // namespace

extern "C" {

// Returns null, or the error.
const char* cross_entropy(const Call* call) {
    try {
        calseg::cuda_cross_entropy(call->launch(), 0, nullptr);
        return nullptr;
    } catch (const std::exception& e) {
        error = e.what();
        return error.c_str();
    }
}

// Chooses the blocks of a grid that are run.
void set_blocks(unsigned first, unsigned last) { on_host::device.first_block = first, on_host::device.last_block = last; }

// Returns number / divisor as the kernels compute it.
uint32_t quotient(uint32_t number, uint32_t divisor) { return calseg::CALSEG_ISA::operator/(number, calseg::quick_divisor(divisor)); }

// Writes the bytes of the structure that the kernel takes, and the plan: blocks, bytes of shared memory, numbers at once,
// whether the call is plain, of few classes, and of rows, the pass, and the parts of a tile. Returns the number of bytes.
int64_t launch_bytes(const Call* call, int64_t* plan, unsigned char* to) {
    const calseg::CrossEntropyLaunch launch = call->launch();
    static_assert(std::is_trivially_copyable_v<calseg::CrossEntropyLaunch>);
    std::memcpy(to, &launch, sizeof launch);
    plan[0] = launch.blocks(), plan[1] = launch.shared_bytes, plan[2] = launch.vector, plan[3] = launch.plain;
    plan[4] = launch.few, plan[5] = launch.in_rows, plan[6] = static_cast<int64_t>(launch.pass), plan[7] = launch.parts;
    return sizeof launch;
}

}  // extern "C"
