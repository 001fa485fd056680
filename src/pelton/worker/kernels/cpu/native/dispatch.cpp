#include <cstring>

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "kernel_table.h"
#include "processor.h"

namespace pelton {

const KernelTable* find_kernels(const char* name) {
    const auto is_wanted = [name](const char* table) { return name == nullptr || std::strcmp(name, table) == 0; };
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    const bool has_tiles = has_avx512 && __builtin_cpu_supports("avx512vbmi") && processor_features().tile_bf16;
    if (has_tiles && is_wanted("amx")) return &amx_kernels();
    if (has_avx512 && is_wanted("avx512")) return &avx512_kernels();
    if (has_avx2 && is_wanted("avx2_vnni") && processor_features().avx_vnni) return &avx2_vnni_kernels();
    if (has_avx2 && is_wanted("avx2")) return &avx2_kernels();
#elif defined(__aarch64__)
    if ((getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0 && is_wanted("neon_dotprod")) return &neon_dotprod_kernels();
#endif
    return is_wanted("portable") ? &portable_kernels() : nullptr;
}

}  // namespace pelton
