#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernel_table.h"

namespace pelton {

#if defined(__x86_64__)
namespace {

// gcc learned to ask for "amx-bf16" only in version 11, clang in 18.
bool has_tiles() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    return (d & kBf16) && (d & kTile);
}

}  // namespace
#endif

const KernelTable* find_kernels(const char* name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    const bool wants_tiles = name == nullptr || std::strcmp(name, "amx") == 0;
    if (has_avx512 && wants_tiles && has_tiles() && request_tiles()) return &amx_kernels();
    if (has_avx512 && (name == nullptr || std::strcmp(name, "avx512") == 0)) return &avx512_kernels();
    if (has_avx2 && (name == nullptr || std::strcmp(name, "avx2") == 0)) return &avx2_kernels();
#endif
    if (name == nullptr || std::strcmp(name, "portable") == 0) return &portable_kernels();
    return nullptr;
}

}  // namespace pelton
