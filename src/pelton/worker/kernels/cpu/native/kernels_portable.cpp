// Any processor, Arm included.
#define PELTON_ISA portable
#include "kernels_generic.h"

namespace pelton {

const KernelTable& portable_kernels() {
    static const KernelTable table = portable::make_table("portable");
    return table;
}

}  // namespace pelton
