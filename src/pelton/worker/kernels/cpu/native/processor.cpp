#include "processor.h"

#if defined(__x86_64__)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace pelton {

namespace {

bool request_tiles() {
#if defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

ProcessorFeatures find_features() {
    ProcessorFeatures found;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
    constexpr unsigned kTileBf16 = 1u << 22, kTile = 1u << 24, kTileInt8 = 1u << 25, kAvxVnni = 1u << 4;
    const bool has_tiles = (d & kTile) != 0 && request_tiles();
    found.tile_bf16 = has_tiles && (d & kTileBf16) != 0;
    found.tile_int8 = has_tiles && (d & kTileInt8) != 0;
    // What the system must save for it is AVX2's.
    found.avx_vnni = __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & kAvxVnni) != 0;
    return found;
}

}  // namespace

const ProcessorFeatures& processor_features() {
    static const ProcessorFeatures features = find_features();
    return features;
}

}  // namespace pelton

#endif
