// AVX2 with FMA and F16C (Haswell, Zen and later).
#define PELTON_ISA avx2
#include "kernels_generic.h"

namespace pelton {

const KernelTable& avx2_kernels() {
    static const KernelTable table = avx2::make_table("avx2");
    return table;
}

}  // namespace pelton
