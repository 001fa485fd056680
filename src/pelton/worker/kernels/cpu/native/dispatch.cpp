#include <cstring>

#include "kernel_table.h"

namespace pelton {

const KernelTable* find_kernels(const char* name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    if (has_avx512 && (name == nullptr || std::strcmp(name, "avx512") == 0)) return &avx512_kernels();
    if (has_avx2 && (name == nullptr || std::strcmp(name, "avx2") == 0)) return &avx2_kernels();
#endif
    if (name == nullptr || std::strcmp(name, "portable") == 0) return &portable_kernels();
    return nullptr;
}

}  // namespace pelton
