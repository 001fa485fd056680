// Keys and values that are needed next, on their way into the second-level cache.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "attention.h"

namespace pelton::avx512 {

// A few lines at a time, between computations: all at once, they would hold up whatever is loaded meanwhile.
class UpcomingLines {
public:
    UpcomingLines(const AttentionShape& shape, const UpcomingBlocks& blocks, const void* keys, const void* values)
        : blocks_(blocks),
          caches_{static_cast<const char*>(keys), static_cast<const char*>(values)},
          num_kv_heads_(shape.num_kv_heads),
          piece_bytes_(static_cast<int64_t>(shape.block_size) * shape.head_dim * kv_bytes(shape.kv_type)),
          piece_(2 * blocks.first) {}

    void fetch(int num_lines) {
        while (num_lines > 0 && piece_ < 2 * blocks_.last) {
            const int64_t block = blocks_.block_table[piece_ / 2];
            const char* piece = caches_[piece_ % 2] + (block * num_kv_heads_ + blocks_.kv_head) * piece_bytes_;
            const int64_t end = std::min(piece_bytes_, offset_ + 64 * static_cast<int64_t>(num_lines));
            for (; offset_ < end; offset_ += 64, --num_lines) _mm_prefetch(piece + offset_, _MM_HINT_T1);
            if (offset_ < piece_bytes_) return;
            offset_ = 0;
            ++piece_;
        }
    }

private:
    const UpcomingBlocks& blocks_;
    const char* caches_[2];
    int num_kv_heads_;
    int64_t piece_bytes_;  // a head's keys, or values, in a block
    int piece_;            // keys and values of a block in turn
    int64_t offset_ = 0;
};

}  // namespace pelton::avx512
