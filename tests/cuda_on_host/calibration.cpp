// kernels/calibration.cu on a CPU, for tests/test_cuda.py: plain functions of integers.
#include "../../kernels/calibration.cu"

#include "../../csrc/cuda/calibration.cpp"

namespace {

calseg::TensorView view(const int64_t* v) {
    if (!v) return {};
    return {reinterpret_cast<void*>(v[0]), static_cast<calseg::DType>(v[1]), v[2], v[3], v[4]};
}

std::string error;

}  // namespace

// shape [3]; scores, labels, mask [5] or null; numbers [n_bins, first_class, ignore_index]; flags [from_logits, class_wise,
// skip_background, per_item, right_closed]; sums, totals, faults
extern "C" {

// Null, or why it failed.
const char* calibration_bins(const int64_t* shape, const int64_t* scores, const int64_t* labels, const int64_t* mask,
                             const int64_t* numbers, const int64_t* flags, double tolerance, int64_t* sums, int64_t* totals,
                             int64_t* faults, int device, void* stream) {
    const calseg::CalibrationArgs args{{shape[0], shape[1], shape[2]}, view(scores), {view(labels), numbers[2]}, view(mask), numbers[0],
                                       numbers[1], flags[0] != 0, flags[1] != 0, flags[2] != 0, flags[3] != 0, flags[4] != 0,
                                       tolerance, sums, totals, nullptr};
    try {
        calseg::cuda_calibration_bins(args, faults, device, stream);
        return nullptr;
    } catch (const std::exception& e) {
        error = e.what();
        return error.c_str();
    }
}

// Of the last launch: blocks, bytes of shared memory, device; and the device that is current.
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

}  // extern "C"
