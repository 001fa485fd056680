// Attention by columns: what an instruction set that shares blocks among requests implements.
#pragma once

#include <cstdint>
#include <span>

#include "attention.h"

namespace pelton {

struct ColumnKernels {
    // Whether the others take the shape. Caches are then [num_blocks, K, ...], and what a head has in a block lies
    // together, block_size * D values in an order of the kernels' own.
    bool (*can_attend)(const AttentionShape& shape);

    // One head's key [D] and value [D] of a token into slot `offset` of the head's block of either cache.
    void (*store_head)(const AttentionShape& shape, const float* key, const float* value, int offset, void* keys,
                       void* values);

    // The results of a run's columns. Scratch of all three: scratch_floats, aligned to 64.
    void (*attend)(const AttentionShape& shape, const ColumnRun& run, const void* keys, const void* values, int kv_head,
                   float* scratch);

    // What the chunk of positions from `start` adds to a run's columns: a part of part_floats for every kPartColumns.
    void (*attend_chunk)(const AttentionShape& shape, const ColumnRun& run, const void* keys, const void* values,
                         int kv_head, int start, float* parts, float* scratch);

    // The results of up to kPartColumns columns from all chunks that they see, in order.
    void (*merge_chunks)(const AttentionShape& shape, std::span<const ChunkPart> parts, const AttentionColumn* columns,
                         int num_columns, float* scratch);

    int64_t (*part_floats)(int head_dim);
    int64_t (*scratch_floats)(int head_dim, int num_columns);
};

}  // namespace pelton
