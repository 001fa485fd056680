// Armv8.2-A with dot products (Cortex-A76, Apple M1, Graviton 2 and later). Run under emulation only so far.
#define PELTON_ISA neon_dotprod
#include "kernels_generic.h"

namespace pelton {

const KernelTable& neon_dotprod_kernels() {
    static const KernelTable table = neon_dotprod::make_table("neon_dotprod");
    return table;
}

}  // namespace pelton
