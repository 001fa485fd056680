// What a processor and its system offer and __builtin_cpu_supports of some compilers cannot be asked for.
#pragma once

namespace pelton {

#if defined(__x86_64__)
struct ProcessorFeatures {
    bool avx_vnni = false;
    bool tile_bf16 = false;  // and the system lends this process the tile registers
    bool tile_int8 = false;
};

// Asks the system for the tile registers where the processor has any.
const ProcessorFeatures& processor_features();
#endif

}  // namespace pelton
