// Attention of one key-value head over a run of one request's tokens, with bfloat16 tiles.
//
// A query head of a token is a column: scores are keys [16, D] times queries [D, 16], so that softmax runs
// down the columns without a sum across a register, and results are values [D, 16 keys] times
// probabilities [16 keys, 16]. Keys lie in the cache as everywhere; values lie transposed, in each block
// [K][D][block_size], which is what the second product reads.
//
// Law 3: positions are taken in chunks that start at multiples of kChunkPositions. What a chunk adds to a
// column depends on that column and the chunk alone; chunks are merged in order.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "attention_avx512.h"
#include "tile_registers.h"
#include "tiles.h"

namespace pelton::amx {

constexpr int kChunkPositions = 256;
constexpr int kBlockPositions = 16;  // positions a tile of keys has
constexpr int kChunkBlocks = kChunkPositions / kBlockPositions;
constexpr int kColumns = 16;
constexpr float kHidden = -1e30f;  // the score of what a column does not see: finite, so that it subtracts
constexpr float kLog2E = 1.44269504f;

// 2^x for x <= 0 within 3e-6: probabilities are rounded to bfloat16 anyway. Exactly 1 at 0.
inline __m512 exp2_negative(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(9.582853193e-3f), _mm512_set1_ps(5.590642771e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402409863e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931241931e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

class HeadRun {
public:
    HeadRun(const AttentionShape& shape, const AttentionRequest& request, const void* keys, const void* values,
            int kv_head, int first_token, int num_tokens, float* scratch)
        : shape_(shape),
          request_(request),
          keys_(static_cast<const uint16_t*>(keys)),
          values_(static_cast<const uint16_t*>(values)),
          kv_head_(kv_head),
          first_token_(first_token),
          num_heads_(shape.num_heads / shape.num_kv_heads),
          num_columns_(num_tokens * num_heads_),
          num_tiles_((num_columns_ + kColumns - 1) / kColumns),
          first_position_(request.seq_len - request.num_tokens + first_token),
          last_position_(first_position_ + num_tokens - 1),
          dim_(shape.head_dim) {
        const auto take = [&scratch](int64_t num_floats) {
            float* part = scratch;
            scratch += num_floats;
            return part;
        };
        queries_ = reinterpret_cast<uint16_t*>(take(static_cast<int64_t>(num_tiles_) * dim_ * kColumns / 2));
        results_ = take(static_cast<int64_t>(num_tiles_) * dim_ * kColumns);
        maxima_ = take(static_cast<int64_t>(num_tiles_) * kColumns);
        sums_ = take(static_cast<int64_t>(num_tiles_) * kColumns);
        scores_ = take(kChunkPositions * kColumns);
        probabilities_ = reinterpret_cast<uint16_t*>(take(kChunkPositions * kColumns / 2));
        part_ = take(static_cast<int64_t>(dim_) * kColumns);
        for (auto& edge : edges_) {
            edge.values = reinterpret_cast<uint16_t*>(take(static_cast<int64_t>(dim_) * kBlockPositions / 2));
        }
    }

    static int64_t scratch_floats(const AttentionShape& shape, int num_tokens) {
        const int64_t tiles = (num_tokens * (shape.num_heads / shape.num_kv_heads) + kColumns - 1) / kColumns;
        return tiles * (shape.head_dim * kColumns * 3 / 2 + 2 * kColumns) + kChunkPositions * kColumns * 3 / 2 +
               shape.head_dim * (kColumns + 2 * kBlockPositions / 2);
    }

    void run() {
        configure();
        for (int tile = 0; tile < num_tiles_; ++tile) load_queries(tile);
        std::fill_n(results_, static_cast<int64_t>(num_tiles_) * dim_ * kColumns, 0.0f);
        std::fill_n(sums_, num_tiles_ * kColumns, 0.0f);
        std::fill_n(maxima_, num_tiles_ * kColumns, kHidden);
        const int first = first_visible(first_position_);
        load_edge(edges_[0], first / kBlockPositions * kBlockPositions);
        load_edge(edges_[1], last_position_ / kBlockPositions * kBlockPositions);
        for (int start = first / kChunkPositions * kChunkPositions; start <= last_position_; start += kChunkPositions) {
            for (int tile = 0; tile < num_tiles_; ++tile) add_chunk(tile, start);
        }
        for (int tile = 0; tile < num_tiles_; ++tile) store(tile);
        release_tiles();
    }

private:
    // A copy of 16 positions' values [D][16].
    struct Edge {
        int start;
        uint16_t* values;
    };

    // Registers 0..3 sum; 4 and 5 are keys and queries, 6 and 7 values and probabilities.
    static void configure() {
        TileConfig config;
        for (int tile = 0; tile < 6; ++tile) config.set(tile, 16, 64);
        config.set(6, 16, 2 * kBlockPositions);
        config.set(7, kBlockPositions / 2, 64);
        config.load();
    }

    int position_of(int column) const { return first_position_ + column / num_heads_; }
    int first_visible(int position) const {
        return shape_.sliding_window > 0 ? std::max(0, position - shape_.sliding_window + 1) : 0;
    }
    int last_column(int tile) const { return std::min((tile + 1) * kColumns, num_columns_) - 1; }
    int64_t row_offset(int column) const {
        return static_cast<int64_t>(kv_head_ * num_heads_ + column % num_heads_) * dim_;
    }

    // [D / 32] tiles of 16 pairs of dimensions x 16 columns x 2; columns that do not exist are 0.
    void load_queries(int tile) {
        for (int d = 0; d < dim_; d += 32) {
            __m512i rows[16];
            for (int i = 0; i < kColumns; ++i) {
                const int column = tile * kColumns + i;
                if (column >= num_columns_) {
                    rows[i] = _mm512_setzero_si512();
                    continue;
                }
                const float* from =
                    request_.query + (first_token_ + column / num_heads_) * request_.ld_query + row_offset(column) + d;
                rows[i] = reinterpret_cast<__m512i>(
                    _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from)));
            }
            avx512::transpose(rows);
            uint16_t* to = query_tiles(tile) + d * kColumns;
            for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 32, rows[i]);
        }
    }

    uint16_t* query_tiles(int tile) const { return queries_ + static_cast<int64_t>(tile) * dim_ * kColumns; }
    float* result(int tile) const { return results_ + static_cast<int64_t>(tile) * dim_ * kColumns; }

    int64_t block_at(int position) const { return request_.block_table[position / shape_.block_size]; }

    const uint16_t* keys_at(int position) const {
        const int64_t slot = block_at(position) * shape_.block_size + position % shape_.block_size;
        return keys_ + (slot * shape_.num_kv_heads + kv_head_) * dim_;
    }

    const uint16_t* values_at(int position) const {
        return values_ + (block_at(position) * shape_.num_kv_heads + kv_head_) * dim_ * shape_.block_size +
               position % shape_.block_size;
    }

    // Slots out of the request's window or not written yet may hold anything, NaN too, and 0 times NaN would reach
    // the result: the first and the last positions are read from a copy.
    void load_edge(Edge& edge, int start) {
        const uint32_t before = (1u << std::clamp(first_visible(first_position_) - start, 0, kBlockPositions)) - 1;
        const uint32_t written = (1u << std::clamp(request_.seq_len - start, 0, kBlockPositions)) - 1;
        const auto mask = static_cast<__mmask16>(written & ~before);
        edge.start = start;
        const uint16_t* from = values_at(start);
        for (int d = 0; d < dim_; ++d) {
            _mm256_store_si256(reinterpret_cast<__m256i*>(edge.values + d * kBlockPositions),
                               _mm256_maskz_loadu_epi16(mask, from + d * shape_.block_size));
        }
    }

    void add_chunk(int tile, int start) {
        const int first = first_visible(position_of(tile * kColumns));
        const int last = position_of(last_column(tile));
        const int first_block = std::max(0, first - start) / kBlockPositions;
        const int end_block = std::min(last - start, kChunkPositions - 1) / kBlockPositions + 1;
        if (start > last || first_block >= end_block) return;
        for (int block = first_block; block < end_block; block += 4) {
            score_blocks(tile, start, block, std::min(block + 4, end_block));
        }
        __m512 sum;
        const __m512 largest = soften(tile, start, first_block, end_block, sum);
        for (int d = 0; d < dim_; d += 4 * kColumns) add_values(start, first_block, end_block, d);
        merge(tile, largest, sum);
    }

    // Scores [positions, 16] of up to four blocks.
    void score_blocks(int tile, int start, int first, int end) {
        const int64_t row_bytes = static_cast<int64_t>(shape_.num_kv_heads) * dim_ * 2;
        const uint16_t* keys[4];
        for (int i = 0; i < 4; ++i) keys[i] = keys_at(start + std::min(first + i, end - 1) * kBlockPositions);
        zero_tile<0>();
        zero_tile<1>();
        zero_tile<2>();
        zero_tile<3>();
        const uint16_t* queries = query_tiles(tile);
        for (int d = 0; d < dim_; d += 32) {
            load_tile<5>(queries + d * kColumns, 64);
            load_tile<4>(keys[0] + d, row_bytes);
            multiply_tiles<0, 4, 5>();
            if (end - first > 1) {
                load_tile<4>(keys[1] + d, row_bytes);
                multiply_tiles<1, 4, 5>();
            }
            if (end - first > 2) {
                load_tile<4>(keys[2] + d, row_bytes);
                multiply_tiles<2, 4, 5>();
            }
            if (end - first > 3) {
                load_tile<4>(keys[3] + d, row_bytes);
                multiply_tiles<3, 4, 5>();
            }
        }
        float* to = scores_ + first * kBlockPositions * kColumns;
        store_tile<0>(to, 64);
        if (end - first > 1) store_tile<1>(to + 256, 64);
        if (end - first > 2) store_tile<2>(to + 512, 64);
        if (end - first > 3) store_tile<3>(to + 768, 64);
    }

    // Scores to probabilities relative to the chunk's own maximum, which is returned, scaled; `sum` is theirs.
    __m512 soften(int tile, int start, int first_block, int end_block, __m512& sum) {
        const int begin = first_block * kBlockPositions, end = end_block * kBlockPositions;
        hide(tile, start, begin, end);
        __m512 maxima[4];
        for (auto& maximum : maxima) maximum = _mm512_set1_ps(kHidden);
        for (int i = begin; i < end; i += 4) {
            for (int j = 0; j < 4; ++j) maxima[j] = _mm512_max_ps(maxima[j], _mm512_load_ps(scores_ + (i + j) * kColumns));
        }
        const __m512 scale = _mm512_set1_ps(shape_.softcap > 0.0f ? 1.0f : shape_.scale * kLog2E);
        const __m512 most = _mm512_max_ps(_mm512_max_ps(maxima[0], maxima[1]), _mm512_max_ps(maxima[2], maxima[3]));
        // A column that sees nothing here gets probabilities of 0 and leaves its maximum as it is.
        const __mmask16 sees = _mm512_cmp_ps_mask(most, _mm512_set1_ps(kHidden), _CMP_NLE_UQ);
        const __m512 largest = _mm512_maskz_mul_ps(sees, most, scale);
        alignas(64) static const uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                             8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        const __m512i interleave = _mm512_load_si512(kInterleave);
        // The sum's order is that of positions, two strands of it, whatever block comes first.
        __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int i = begin; i < end; i += 2) {
            const float* scores = scores_ + i * kColumns;
            const __m512 even = exp2_negative(_mm512_fmsub_ps(_mm512_load_ps(scores), scale, largest));
            const __m512 odd = exp2_negative(_mm512_fmsub_ps(_mm512_load_ps(scores + kColumns), scale, largest));
            sums[0] = _mm512_add_ps(sums[0], even);
            sums[1] = _mm512_add_ps(sums[1], odd);
            const auto pairs = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
            _mm512_store_si512(probabilities_ + i * kColumns, _mm512_permutexvar_epi16(interleave, pairs));
        }
        sum = _mm512_add_ps(sums[0], sums[1]);
        return _mm512_mask_mov_ps(_mm512_set1_ps(kHidden), sees, largest);
    }

    // Caps scores (and scales them, as powers of 2), and overwrites those of positions that a column does not see.
    void hide(int tile, int start, int begin, int end) {
        if (shape_.softcap > 0.0f) {
            const __m512 in = _mm512_set1_ps(shape_.scale / shape_.softcap);
            const __m512 out = _mm512_set1_ps(shape_.softcap * kLog2E);
            for (int i = begin; i < end; ++i) {
                const __m512 score = _mm512_load_ps(scores_ + i * kColumns);
                _mm512_store_ps(scores_ + i * kColumns, _mm512_mul_ps(avx512::tanh_of(_mm512_mul_ps(score, in)), out));
            }
        }
        const int first_column = tile * kColumns;
        const bool all_before = start + end - 1 <= position_of(first_column);
        const bool none_too_old = start + begin >= first_visible(position_of(last_column(tile)));
        if (all_before && none_too_old) return;
        alignas(64) int positions[kColumns], oldest[kColumns];
        for (int i = 0; i < kColumns; ++i) {
            positions[i] = position_of(first_column + i);
            oldest[i] = first_visible(positions[i]);
        }
        const __m512i last = _mm512_load_si512(positions), first = _mm512_load_si512(oldest);
        const __m512 hidden = _mm512_set1_ps(kHidden);
        for (int i = begin; i < end; ++i) {
            const __m512i position = _mm512_set1_epi32(start + i);
            const __mmask16 seen = _mm512_cmple_epi32_mask(position, last) & _mm512_cmpge_epi32_mask(position, first);
            float* score = scores_ + i * kColumns;
            _mm512_store_ps(score, _mm512_mask_mov_ps(hidden, seen, _mm512_load_ps(score)));
        }
    }

    // part [64 dimensions from d on, 16] = values times probabilities.
    void add_values(int start, int first, int end, int d) {
        const int count = std::min(4, (dim_ - d) / 16);
        zero_tile<0>();
        zero_tile<1>();
        zero_tile<2>();
        zero_tile<3>();
        for (int block = first; block < end; ++block) {
            const int position = start + block * kBlockPositions;
            const Edge* edge = position == edges_[0].start   ? &edges_[0]
                               : position == edges_[1].start ? &edges_[1]
                                                             : nullptr;
            const int64_t stride = edge != nullptr ? kBlockPositions : shape_.block_size;
            const uint16_t* values = (edge != nullptr ? edge->values : values_at(position)) + d * stride;
            load_tile<7>(probabilities_ + block * kBlockPositions * kColumns, 64);
            load_tile<6>(values, 2 * stride);
            multiply_tiles<0, 6, 7>();
            load_tile<6>(values + 16 * stride, 2 * stride);
            multiply_tiles<1, 6, 7>();
            if (count == 2) continue;
            load_tile<6>(values + 32 * stride, 2 * stride);
            multiply_tiles<2, 6, 7>();
            load_tile<6>(values + 48 * stride, 2 * stride);
            multiply_tiles<3, 6, 7>();
        }
        float* to = part_ + d * kColumns;
        store_tile<0>(to, 64);
        store_tile<1>(to + 256, 64);
        if (count == 2) return;
        store_tile<2>(to + 512, 64);
        store_tile<3>(to + 768, 64);
    }

    void merge(int tile, __m512 largest, __m512 sum) {
        float* maxima = maxima_ + tile * kColumns;
        float* sums = sums_ + tile * kColumns;
        const __m512 before = _mm512_load_ps(maxima);
        const __m512 maximum = _mm512_max_ps(before, largest);
        const __m512 keep = exp2_negative(_mm512_sub_ps(before, maximum));
        const __m512 take = exp2_negative(_mm512_sub_ps(largest, maximum));
        _mm512_store_ps(maxima, maximum);
        _mm512_store_ps(sums, _mm512_fmadd_ps(_mm512_load_ps(sums), keep, _mm512_mul_ps(sum, take)));
        float* result = this->result(tile);
        for (int d = 0; d < dim_; ++d) {
            const __m512 part = _mm512_mul_ps(_mm512_load_ps(part_ + d * kColumns), take);
            _mm512_store_ps(result + d * kColumns, _mm512_fmadd_ps(_mm512_load_ps(result + d * kColumns), keep, part));
        }
    }

    void store(int tile) {
        const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_load_ps(sums_ + tile * kColumns));
        const int64_t ld_out = static_cast<int64_t>(shape_.num_heads) * dim_;
        const int count = last_column(tile) - tile * kColumns + 1;
        for (int d = 0; d < dim_; d += 16) {
            __m512i rows[16];
            for (int i = 0; i < 16; ++i) {
                rows[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(result(tile) + (d + i) * kColumns), inverse));
            }
            avx512::transpose(rows);
            for (int i = 0; i < count; ++i) {
                const int column = tile * kColumns + i;
                float* to = request_.out + (first_token_ + column / num_heads_) * ld_out + row_offset(column) + d;
                _mm512_storeu_si512(to, rows[i]);
            }
        }
    }

    const AttentionShape& shape_;
    const AttentionRequest& request_;
    const uint16_t* keys_;
    const uint16_t* values_;
    int kv_head_;
    int first_token_;
    int num_heads_;
    int num_columns_;
    int num_tiles_;
    int first_position_;
    int last_position_;
    int dim_;
    uint16_t* queries_;
    float* results_;       // [tiles][D][16]
    float* maxima_;        // [tiles][16], in powers of 2
    float* sums_;
    float* scores_;        // [kChunkPositions][16]
    uint16_t* probabilities_;  // [kChunkPositions / 2][16][2]
    float* part_;          // [D][16]
    Edge edges_[2];
};

inline bool can_attend(const AttentionShape& shape) {
    return shape.kv_type == KVType::BF16 && shape.block_size % kBlockPositions == 0 && shape.head_dim % 32 == 0;
}

inline int64_t attention_scratch_floats(const AttentionShape& shape) {
    return HeadRun::scratch_floats(shape, kTileTokens);
}

// One token's head [D] into its place in a transposed block: values are `stride` apart.
inline void store_values(const float* from, int dim, int64_t stride, uint16_t* to) {
    for (int d = 0; d < dim; d += 16) {
        alignas(32) uint16_t values[16];
        _mm256_store_si256(reinterpret_cast<__m256i*>(values),
                           reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(from + d))));
        for (int i = 0; i < 16; ++i) to[(d + i) * stride] = values[i];
    }
}

inline void attend_head(const AttentionShape& shape, const AttentionRequest& request, const void* keys,
                        const void* values, int kv_head, int first_token, int num_tokens, float* scratch) {
    HeadRun(shape, request, keys, values, kv_head, first_token, num_tokens, scratch).run();
}

}  // namespace pelton::amx
