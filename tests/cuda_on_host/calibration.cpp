// Interface of kernels/calibration_bins.cu on a CPU for tests/test_cuda.py: functions of plain integers.
#include "../../kernels/calibration_bins.cu"

#include "../../csrc/cuda/plan.cpp"
#include "views.h"

namespace {

// Arguments of a call:
//   shape                 [N, C, S]
//   scores, labels, mask  [data, dtype, stride_n, stride_c, stride_s] or null
//   numbers               [n_bins, first_class, ignore_index]
//   flags                 [from_logits, class_wise, skip_background, per_item, right_closed]
struct Call {
    const int64_t *shape, *scores, *labels, *mask, *numbers, *flags;

    calseg::BinsArgs args() const {
        calseg::BinsArgs a;
        a.shape = {shape[0], shape[1], shape[2]};
        read_view(scores, a.scores);
        read_view(labels, a.spec.labels.tensor);
        read_view(mask, a.spec.mask);
        a.spec.n_bins = numbers[0], a.spec.first_class = numbers[1], a.spec.labels.ignore_index = numbers[2];
        a.spec.from_logits = flags[0], a.spec.class_wise = flags[1], a.spec.skip_background = flags[2], a.spec.per_item = flags[3];
        a.spec.right_closed = flags[4];
        return a;
    }
};

std::string error;

}  // namespace

extern "C" {

// Returns null, or the error.
const char* calibration_bins(const Call* call, double tolerance, int64_t* sums, int64_t* totals, int64_t* faults, int device,
                             void* stream) {
    calseg::BinsArgs args = call->args();
    args.spec.tolerance = tolerance, args.sums = sums, args.totals = totals;
    try {
        calseg::cuda_calibration_bins(args, faults, device, stream);
        return nullptr;
    } catch (const std::exception& e) {
        error = e.what();
        return error.c_str();
    }
}

// Writes the launch that the host decides where `resident` blocks fit a multiprocessor of the emulated GPU.
void plan_launch(const Call* call, int64_t resident, int64_t* to) {
    const on_host::Device& d = on_host::device;
    const calseg::CudaLimits limits{d.multiprocessors, d.shared_per_multiprocessor, d.shared_per_block};
    calseg::CalibrationLaunch launch = calseg::calibration_launch(call->args(), limits);
    calseg::set_blocks(launch, limits, resident);
    const calseg::LabelRange& bits = launch.labels;
    for (const int64_t number :
         {launch.args.shape.N, launch.args.shape.S, launch.args.scores.stride_s, launch.args.spec.labels.tensor.stride_s,
          static_cast<int64_t>(launch.bins_in), int64_t{launch.classes_held}, int64_t{launch.transposed}, launch.tiles_per_item,
          launch.groups, launch.tiles_per_group, launch.blocks_per_group, launch.shared_bytes, static_cast<int64_t>(bits.classes),
          static_cast<int64_t>(bits.ignored), int64_t{bits.ignores}})
        *to++ = number;
}

// Writes the bytes of the structure that the kernel takes. Returns their number.
int64_t launch_bytes(const Call* call, double tolerance, int64_t* sums, int64_t* totals, int64_t* faults, int64_t resident,
                     unsigned char* to) {
    const on_host::Device& d = on_host::device;
    const calseg::CudaLimits limits{d.multiprocessors, d.shared_per_multiprocessor, d.shared_per_block};
    calseg::BinsArgs args = call->args();
    args.spec.tolerance = tolerance, args.sums = sums, args.totals = totals;
    calseg::CalibrationLaunch launch = calseg::calibration_launch(args, limits);
    calseg::set_blocks(launch, limits, resident);
    launch.faults = faults;
    static_assert(std::is_trivially_copyable_v<calseg::CalibrationLaunch>);
    std::memcpy(to, &launch, sizeof launch);
    return sizeof launch;
}

// Writes blocks, bytes of shared memory and device of the last launch, and the current device.
void last_launch(int64_t* to) {
    const on_host::Device& device = on_host::device;
    to[0] = device.blocks, to[1] = device.shared_bytes, to[2] = device.device_of_launch, to[3] = device.current;
}

void set_device(int current, int multiprocessors, int shared_per_multiprocessor, int shared_per_block, unsigned first_block,
                unsigned last_block) {
    on_host::device.current = current;
    on_host::device.multiprocessors = multiprocessors;
    on_host::device.shared_per_multiprocessor = shared_per_multiprocessor;
    on_host::device.shared_per_block = shared_per_block;
    on_host::device.first_block = first_block;
    on_host::device.last_block = last_block;
}

// Runs a kernel that would hang or be undefined on a GPU. Returns the error that the emulation gives, or an empty text.
const char* run_wrong_kernel(int which) {
    static void (*const kernels[])(int) = {
        [](int) {
            if (threadIdx.x < 40) __syncthreads();
        },
        [](int) {
            if (threadIdx.x % 2) __ballot_sync(0xffffffffu, true);
        },
        [](int) {
            if (threadIdx.x % 2) __ballot_sync(0xffffffffu, true);
            else __syncwarp();
        },
        [](int) { __ballot_sync(0x0000ffffu, true); },
        [](int) {
            __syncthreads();
            __ballot_sync(0xffffffffu, true);
        },
    };
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1);
    config.blockDim = dim3(64);
    return cudaLaunchKernelEx(&config, kernels[which], 0) == cudaSuccess ? "" : cudaGetErrorString(cudaErrorLaunchFailure);
}

}  // extern "C"
