#include "host/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(CALSEG_X86)
#include <cpuid.h>
#endif

namespace calseg {
namespace {

#if defined(CALSEG_X86)
// Instruction sets that the processor has and the system supports.
//
// __builtin_cpu_supports() would say the same, but it needs the compiler's runtime library. It is always false with that of
// Zig, and clang-cl does not link one.
struct Processor {
    bool avx2 = false, avx512 = false;  // each with FMA and the conversions of float16

    Processor() {
        unsigned a = 0, b = 0, c = 0, d = 0;
        constexpr unsigned kFma = 1u << 12, kSaved = 1u << 27, kF16c = 1u << 29, kFirst = kFma | kSaved | kF16c;
        if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kFirst) != kFirst || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        unsigned saved = 0, upper = 0;  // the registers that the system saves
        __asm__("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
        constexpr unsigned kAvx2 = 1u << 5, kF = 1u << 16, kDQ = 1u << 17, kBW = 1u << 30, kVL = 1u << 31, kAvx512 = kF | kDQ | kBW | kVL;
        constexpr unsigned kYmm = 0x06, kZmm = 0xe6;
        avx2 = (b & kAvx2) == kAvx2 && (saved & kYmm) == kYmm;
        avx512 = avx2 && (b & kAvx512) == kAvx512 && (saved & kZmm) == kZmm;
    }
};
const Processor& processor() {
    static const Processor found;
    return found;
}
#endif

struct Isa {
    const char* name;
    const KernelTable *in_float, *in_double;
    bool (*supported)();
};

// All instruction sets of this build, best first.
const Isa isas[] = {
#if defined(CALSEG_X86)
    {"avx512", &avx512::kernels, &avx2_double::kernels, [] { return processor().avx512; }},
    {"avx2", &avx2::kernels, &avx2_double::kernels, [] { return processor().avx2; }},
#endif
    {"baseline", &baseline::kernels, &baseline_double::kernels, [] { return true; }},
};

const Isa& find(const std::string& name) {
    std::string known;
    for (const Isa& isa : isas) {
        if (!isa.supported()) continue;
        if (name == isa.name) return isa;
        known += known.empty() ? isa.name : std::string(", ") + isa.name;
    }
    throw std::invalid_argument("instruction set '" + name + "' is not available here: wanted one of " + known);
}

const Isa& initial() {
    if (const char* name = std::getenv("CALSEG_ISA"); name && *name) return find(name);
    for (const Isa& isa : isas)
        if (isa.supported()) return isa;
    throw std::logic_error("no instruction set");
}

std::atomic<const Isa*>& chosen() {
    static std::atomic<const Isa*> isa{&initial()};
    return isa;
}

}  // namespace

const KernelTable& kernels(DType scores) {
    const Isa& isa = *chosen().load();
    return scores == DType::f64 ? *isa.in_double : *isa.in_float;
}
const char* isa() { return chosen().load()->name; }

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : isas)
        if (isa.supported()) names.emplace_back(isa.name);
    return names;
}

void set_isa(const std::string& name) { chosen() = &find(name); }

}  // namespace calseg
