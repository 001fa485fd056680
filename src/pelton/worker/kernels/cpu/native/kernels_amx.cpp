// AVX-512 with AMX tiles of bfloat16 and of 8 bits (Sapphire Rapids and later).

#include "attention_amx.h"
#include "channel_amx.h"
#include "kernel_table.h"
#include "linear_amx.h"

namespace pelton {

namespace {

// What tiles do not take, vectors do.
const ColumnKernels& columns_of(const AttentionShape& shape) {
    static const ColumnKernels tiles = {amx::can_attend,   amx::store_head,
                                        amx::attend,       amx::attend_chunk,
                                        amx::merge_chunks, amx::PartialSums::num_floats,
                                        amx::HeadColumns::scratch_floats};
    return amx::can_attend(shape) ? tiles : *avx512_kernels().columns;
}

const ColumnKernels kColumns = {
    [](const AttentionShape& shape) { return columns_of(shape).can_attend(shape); },
    [](const AttentionShape& shape, const float* key, const float* value, int offset, void* keys, void* values) {
        columns_of(shape).store_head(shape, key, value, offset, keys, values);
    },
    [](const AttentionShape& shape, const ColumnRun& run, const void* keys, const void* values, int kv_head,
       float* scratch) { columns_of(shape).attend(shape, run, keys, values, kv_head, scratch); },
    [](const AttentionShape& shape, const ColumnRun& run, const void* keys, const void* values, int kv_head, int start,
       float* parts, float* scratch) {
        columns_of(shape).attend_chunk(shape, run, keys, values, kv_head, start, parts, scratch);
    },
    [](const AttentionShape& shape, std::span<const ChunkPart> parts, const AttentionColumn* columns, int num_columns,
       float* scratch) { columns_of(shape).merge_chunks(shape, parts, columns, num_columns, scratch); },
    [](int head_dim) {
        return std::max(amx::PartialSums::num_floats(head_dim), avx512_kernels().columns->part_floats(head_dim));
    },
    [](int head_dim, int num_columns) {
        return std::max(amx::HeadColumns::scratch_floats(head_dim, num_columns),
                        avx512_kernels().columns->scratch_floats(head_dim, num_columns));
    },
};

}  // namespace

const KernelTable& amx_kernels() {
    static const TileKernels tiles = {amx::pack_rows, amx::linear_panels, amx::gated_rows};
    static const KernelTable table = [] {
        KernelTable made = avx512_kernels();
        made.name = "amx";
        made.columns = &kColumns;
        made.tiles = &tiles;
        made.channel_panels = amx::channel_panels;
        made.gated_channel_panels = amx::gated_channel_panels;
        return made;
    }();
    return table;
}

}  // namespace pelton
