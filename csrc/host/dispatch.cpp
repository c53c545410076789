#include "host/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace calseg {
namespace {

struct Isa {
    const char* name;
    const KernelTable* kernels;
    bool (*supported)();
};

// All instruction sets of this build, best first.
const Isa isas[] = {
#if defined(CALSEG_X86_DISPATCH)
    {"avx512", &avx512::kernels,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
     }},
    {"avx2", &avx2::kernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
    {"baseline", &baseline::kernels, [] { return true; }},
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

const KernelTable& kernels() { return *chosen().load()->kernels; }
const char* isa() { return chosen().load()->name; }

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : isas)
        if (isa.supported()) names.emplace_back(isa.name);
    return names;
}

void set_isa(const std::string& name) { chosen() = &find(name); }

}  // namespace calseg
