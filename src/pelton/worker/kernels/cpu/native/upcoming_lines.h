// Keys and values that are needed next, on their way into the second-level cache.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "attention.h"

namespace pelton::avx512 {

// A few lines at a time, between computations: all at once, they would hold up whatever is loaded meanwhile.
class UpcomingLines {
public:
    UpcomingLines(const AttentionShape& shape, const UpcomingBlocks (&blocks)[2], const void* keys, const void* values)
        : blocks_(blocks),
          caches_{static_cast<const char*>(keys), static_cast<const char*>(values)},
          num_kv_heads_(shape.num_kv_heads),
          piece_bytes_(static_cast<int64_t>(shape.block_size) * shape.head_dim * kv_bytes(shape.kv_type)),
          turn_(blocks[0].first < blocks[0].last ? 0 : 1),
          piece_(2 * blocks[turn_].first) {}

    // Of a last piece some lines may be left.
    bool is_empty() const { return turn_ == 1 && piece_ >= 2 * blocks_[1].last && next_ >= end_; }

    void fetch(int num_lines) {
        for (; num_lines > 0; --num_lines, next_ += 64) {
            if (next_ >= end_ && !begin_piece()) return;
            _mm_prefetch(next_, _MM_HINT_T1);
        }
    }

private:
    // Keys and values of a block in turn.
    bool begin_piece() {
        while (piece_ >= 2 * blocks_[turn_].last) {
            if (turn_ == 1) return false;
            piece_ = 2 * blocks_[++turn_].first;
        }
        const int64_t block = blocks_[turn_].block_table[piece_ / 2];
        next_ = caches_[piece_ % 2] + (block * num_kv_heads_ + blocks_[turn_].kv_head) * piece_bytes_;
        end_ = next_ + piece_bytes_;
        ++piece_;
        return true;
    }

    const UpcomingBlocks (&blocks_)[2];
    const char* caches_[2];
    int num_kv_heads_;
    int64_t piece_bytes_;  // a head's keys, or values, in a block
    int turn_;
    int piece_;
    const char* next_ = nullptr;
    const char* end_ = nullptr;
};

}  // namespace pelton::avx512
