// Paged attention: what every instruction set's kernel is given. Legend as in ops.py.
#pragma once

#include <cstdint>

namespace pelton {

enum class KVType { F32, BF16 };

constexpr int kv_bytes(KVType type) { return type == KVType::F32 ? 4 : 2; }

struct AttentionShape {
    int num_heads;
    int num_kv_heads;
    int head_dim;
    int block_size;
    int sliding_window;  // 0: none
    float scale;
    float softcap;  // 0: none
    KVType kv_type;
};

// Caches are [num_blocks, block_size, K, D] of kv_type, but where columns are attended (ColumnKernels).
struct AttentionRequest {
    const float* query;  // [num_tokens, N, D]; rows are ld_query apart
    int64_t ld_query;
    float* out;  // [num_tokens, N * D]
    int num_tokens;
    int seq_len;  // positions in the cache, the new tokens included
    const int64_t* block_table;
};

// A query head of one token, for kernels that take many of them at once. query and out [D]; a null query is a
// place left empty.
struct AttentionColumn {
    const float* query;
    float* out;
    int position;
};

// Blocks [first, last) of one head that the same thread reads next: worth fetching while it computes.
struct UpcomingBlocks {
    const int64_t* block_table = nullptr;
    int first = 0;
    int last = 0;
    int kv_head = 0;
};

// Columns whose visible positions lie in the same blocks; of `block_table`, seq_len positions are written.
struct ColumnRun {
    const AttentionColumn* columns;
    int num_columns;
    int seq_len;
    const int64_t* block_table;
    UpcomingBlocks upcoming[2] = {};  // in turn
};

// What one chunk adds to a request's columns, which are `lane` and the next of a tile.
struct ChunkPart {
    float* data;
    int lane;
};

// Positions are taken in tiles that start at multiples of this, so that a row's sums do not depend on
// how its prompt was cut (law 3).
constexpr int kTilePositions = 64;
// Tokens of one request whose rows share a tile's unpacked keys and values.
constexpr int kTileTokens = 32;

// Floats of scratch that attend_head needs.
inline int64_t attention_scratch_floats(const AttentionShape& shape) {
    const int64_t rows = static_cast<int64_t>(kTileTokens) * (shape.num_heads / shape.num_kv_heads);
    const int64_t dim = (shape.head_dim + 15) / 16 * 16;
    // Keys, values, queries, scores, results, maxima, sums; a cache line of slack each.
    return 2 * kTilePositions * dim + rows * (2 * dim + kTilePositions + 2) + 7 * 16;
}

}  // namespace pelton
