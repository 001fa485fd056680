// AVX-512 with AMX tiles of bfloat16 and of 8 bits (Sapphire Rapids and later).

#include "attention_amx.h"
#include "channel_amx.h"
#include "kernel_table.h"
#include "linear_amx.h"

namespace pelton {

const KernelTable& amx_kernels() {
    static const ColumnKernels columns = {amx::can_attend,   amx::store_head,
                                          amx::attend,       amx::attend_chunk,
                                          amx::merge_chunks, amx::PartialSums::num_floats,
                                          amx::HeadColumns::scratch_floats};
    static const TileKernels tiles = {amx::pack_rows, amx::linear_panels, amx::gated_rows};
    static const KernelTable table = [] {
        KernelTable made = avx512_kernels();
        made.name = "amx";
        made.columns = &columns;
        made.tiles = &tiles;
        made.channel_panels = amx::channel_panels;
        made.gated_channel_panels = amx::gated_channel_panels;
        return made;
    }();
    return table;
}

}  // namespace pelton
