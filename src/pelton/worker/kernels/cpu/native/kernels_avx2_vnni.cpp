// AVX2 with AVX-VNNI (Alder Lake and later clients, which have no AVX-512).
#define PELTON_ISA avx2_vnni
#include "kernels_generic.h"

namespace pelton {

const KernelTable& avx2_vnni_kernels() {
    static const KernelTable table = avx2_vnni::make_table("avx2_vnni");
    return table;
}

}  // namespace pelton
