// Attention of one key-value head with bfloat16 tiles.
//
// A query head of a token is a column (attention.h): scores are keys [16, D] times queries [D, 16], so that softmax runs
// down the columns without a sum across a register, and results are values [D, 16 keys] times
// probabilities [16 keys, 16]. In the cache a block holds a head's keys together, [K][block_size][D], and its values
// transposed, [K][D][block_size], which is what the second product reads.
//
// Law 3: positions are taken in chunks that start at multiples of kChunkPositions. What a chunk adds to a
// column depends on that column and the chunk alone; chunks are merged in order.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "attention_avx512.h"
#include "attention_schedule.h"
#include "tile_registers.h"
#include "tiles.h"

namespace pelton::amx {

constexpr int kBlockPositions = 16;  // positions a tile of keys has
constexpr int kTilePositions = 32;   // and one of values
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

// Sums of 16 columns over one chunk or more: results [D][16], then maxima (powers of 2) and sums [16].
struct PartialSums {
    float* data;
    int dim;

    float* maxima() const { return data + static_cast<int64_t>(dim) * kColumns; }
    float* sums() const { return maxima() + kColumns; }

    void clear() const {
        std::fill_n(data, static_cast<int64_t>(dim) * kColumns, 0.0f);
        std::fill_n(maxima(), kColumns, kHidden);
        std::fill_n(sums(), kColumns, 0.0f);
    }

    // Adds columns [lane, ...) of `part` under `mask` to the first ones here.
    void add(const PartialSums& part, int lane, __mmask16 mask) const {
        const __m512 before = _mm512_load_ps(maxima());
        const __m512 largest = _mm512_mask_loadu_ps(_mm512_set1_ps(kHidden), mask, part.maxima() + lane);
        const __m512 maximum = _mm512_max_ps(before, largest);
        const __m512 keep = exp2_negative(_mm512_sub_ps(before, maximum));
        const __m512 take = exp2_negative(_mm512_sub_ps(largest, maximum));
        _mm512_store_ps(maxima(), maximum);
        const auto merge = [&](float* to, const float* from) {
            const __m512 added = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from + lane), take);
            _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_load_ps(to), keep, added));
        };
        merge(sums(), part.sums());
        for (int d = 0; d < dim; ++d) merge(data + d * kColumns, part.data + d * kColumns);
    }

    // Results over sums, where the columns want them.
    void store(const AttentionColumn* columns, int count) const {
        const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_load_ps(sums()));
        for (int d = 0; d < dim; d += 16) {
            __m512i rows[16];
            for (int i = 0; i < 16; ++i) {
                rows[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(data + (d + i) * kColumns), inverse));
            }
            avx512::transpose(rows);
            for (int i = 0; i < count; ++i) {
                if (columns[i].out != nullptr) _mm512_storeu_si512(columns[i].out + d, rows[i]);
            }
        }
    }

    static constexpr int64_t num_floats(int dim) { return static_cast<int64_t>(dim + 2) * kColumns; }
};

// Columns that see the same blocks.
class HeadColumns {
public:
    HeadColumns(const AttentionShape& shape, const ColumnRun& run, const void* keys, const void* values, int kv_head,
                float* scratch)
        : shape_(shape),
          run_(run),
          keys_(static_cast<const uint16_t*>(keys)),
          values_(static_cast<const uint16_t*>(values)),
          kv_head_(kv_head),
          num_tiles_((run.num_columns + kColumns - 1) / kColumns),
          dim_(shape.head_dim) {
        const auto take = [&scratch](int64_t num_floats) {
            float* part = scratch;
            scratch += num_floats;
            return part;
        };
        queries_ = reinterpret_cast<uint16_t*>(take(static_cast<int64_t>(num_tiles_) * dim_ * kColumns / 2));
        totals_ = take(num_tiles_ * PartialSums::num_floats(dim_));
        for (auto& part : parts_) part = take(PartialSums::num_floats(dim_));
        for (auto& scores : scores_) scores = take(kChunkPositions * kColumns);
        for (auto& probabilities : probabilities_) {
            probabilities = reinterpret_cast<uint16_t*>(take(kChunkPositions * kColumns / 2));
        }
        chunk_values_ = reinterpret_cast<uint16_t*>(take(static_cast<int64_t>(dim_) * kChunkPositions / 2));
        first_position_ = last_position_ = run.columns[0].position;
        for (int i = 1; i < run.num_columns; ++i) {
            if (run.columns[i].query == nullptr) continue;
            first_position_ = std::min(first_position_, run.columns[i].position);
            last_position_ = std::max(last_position_, run.columns[i].position);
        }
    }

    static int64_t scratch_floats(int dim, int num_columns) {
        const int64_t tiles = (num_columns + kColumns - 1) / kColumns;
        return tiles * dim * kColumns / 2 + (tiles + 2) * PartialSums::num_floats(dim) +
               kChunkPositions * kColumns * 3 + dim * kChunkPositions / 2;
    }

    // All that the columns see; writes their results.
    void run() {
        begin();
        for (int tile = 0; tile < num_tiles_; ++tile) total(tile).clear();
        const int first = first_visible(first_position_);
        const PartialSums parts[2] = {{parts_[0], dim_}, {parts_[1], dim_}};
        for (int start = first / kChunkPositions * kChunkPositions; start <= last_position_; start += kChunkPositions) {
            load_values(start);
            for (int tile = 0; tile < num_tiles_; tile += 2) {
                const int count = std::min(2, num_tiles_ - tile);
                add_chunk(tile, count, start, parts);
                for (int i = 0; i < count; ++i) total(tile + i).add(parts[i], 0, 0xffff);
            }
        }
        for (int tile = 0; tile < num_tiles_; ++tile) {
            total(tile).store(run_.columns + tile * kColumns, num_columns(tile));
        }
        release_tiles();
    }

    // What the chunk at `start` adds, to parts [tiles].
    void run_chunk(int start, float* parts) {
        begin();
        load_values(start);
        for (int tile = 0; tile < num_tiles_; tile += 2) {
            const PartialSums pair[2] = {{parts + tile * PartialSums::num_floats(dim_), dim_},
                                         {parts + (tile + 1) * PartialSums::num_floats(dim_), dim_}};
            add_chunk(tile, std::min(2, num_tiles_ - tile), start, pair);
        }
        release_tiles();
    }

private:
    // Registers 0..3 sum; 4 and 5 are keys and queries, 6 and 7 values and probabilities.
    void begin() {
        TileConfig config;
        for (int tile = 0; tile < 8; ++tile) config.set(tile, 16, 64);
        config.load();
        for (int tile = 0; tile < num_tiles_; ++tile) load_queries(tile);
    }

    int first_visible(int position) const {
        return shape_.sliding_window > 0 ? std::max(0, position - shape_.sliding_window + 1) : 0;
    }
    int num_columns(int tile) const { return std::min(kColumns, run_.num_columns - tile * kColumns); }
    PartialSums total(int tile) const { return {totals_ + tile * PartialSums::num_floats(dim_), dim_}; }
    uint16_t* query_tiles(int tile) const { return queries_ + static_cast<int64_t>(tile) * dim_ * kColumns; }

    // [D / 32] tiles of 16 pairs of dimensions x 16 columns x 2; columns that do not exist are 0.
    void load_queries(int tile) {
        for (int d = 0; d < dim_; d += 32) {
            __m512i rows[16];
            for (int i = 0; i < kColumns; ++i) {
                const float* from = i < num_columns(tile) ? run_.columns[tile * kColumns + i].query : nullptr;
                rows[i] = from == nullptr ? _mm512_setzero_si512()
                                          : reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(
                                                _mm512_loadu_ps(from + d + 16), _mm512_loadu_ps(from + d)));
            }
            avx512::transpose(rows);
            uint16_t* to = query_tiles(tile) + d * kColumns;
            for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 32, rows[i]);
        }
    }

    int64_t block_at(int position) const { return run_.block_table[position / shape_.block_size]; }

    const uint16_t* keys_at(int position) const {
        const int64_t first = (block_at(position) * shape_.num_kv_heads + kv_head_) * shape_.block_size;
        return keys_ + (first + position % shape_.block_size) * dim_;
    }

    const uint16_t* values_at(int position) const {
        return values_ + (block_at(position) * shape_.num_kv_heads + kv_head_) * dim_ * shape_.block_size +
               position % shape_.block_size;
    }

    // Values of the chunk at `start` that any column sees, [kChunkPositions / 32][D][32], with zeros around them to whole
    // tiles. Slots out of the columns' window or not written yet may hold anything, NaN too, and 0 times NaN would
    // reach the result.
    void load_values(int start) {
        const int first = std::max(0, first_visible(first_position_) - start);
        const int end = std::min(last_position_ + 1 - start, kChunkPositions);
        for (int at = first / kTilePositions * kTilePositions; at < end; at += kBlockPositions) {
            uint16_t* to = tile_values(at / kTilePositions) + at % kTilePositions;
            fill_values(start + at, to);
        }
        const int last = (end + kBlockPositions - 1) / kBlockPositions * kBlockPositions;
        if (last % kTilePositions != 0) clear_values(tile_values(last / kTilePositions) + kBlockPositions);
    }

    uint16_t* tile_values(int tile) const { return chunk_values_ + static_cast<int64_t>(tile) * dim_ * kTilePositions; }

    // 16 positions of a tile.
    void fill_values(int position, uint16_t* to) const {
        const uint32_t before =
            (1u << std::clamp(first_visible(first_position_) - position, 0, kBlockPositions)) - 1;
        const uint32_t written = (1u << std::clamp(last_position_ + 1 - position, 0, kBlockPositions)) - 1;
        const auto mask = static_cast<__mmask16>(written & ~before);
        if (mask == 0) return clear_values(to);
        const uint16_t* from = values_at(position);
        for (int d = 0; d < dim_; ++d, from += shape_.block_size, to += kTilePositions) {
            _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_loadu_epi16(mask, from));
        }
    }

    void clear_values(uint16_t* to) const {
        for (int d = 0; d < dim_; ++d, to += kTilePositions) {
            _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_setzero_si256());
        }
    }

    // What a tile's columns see.
    struct Sight {
        int first;  // positions of the columns
        int last;
        alignas(64) int positions[kColumns];  // -1 where there is no column
        alignas(64) int oldest[kColumns];
    };

    void look(int tile, Sight& sight) const {
        sight.first = last_position_;
        sight.last = -1;
        for (int i = 0; i < kColumns; ++i) {
            const bool is_column = i < num_columns(tile) && run_.columns[tile * kColumns + i].query != nullptr;
            sight.positions[i] = is_column ? run_.columns[tile * kColumns + i].position : -1;
            sight.oldest[i] = is_column ? first_visible(sight.positions[i]) : 0;
            if (!is_column) continue;
            sight.first = std::min(sight.first, sight.positions[i]);
            sight.last = std::max(sight.last, sight.positions[i]);
        }
    }

    // The sums of one or two neighbouring tiles over a chunk. Two share what is loaded of keys and values.
    void add_chunk(int tile, int num_tiles, int start, const PartialSums* parts) {
        Sight sights[2];
        int first = kChunkPositions, end = 0;  // of the chunk, what any column sees
        for (int i = 0; i < num_tiles; ++i) {
            look(tile + i, sights[i]);
            first = std::min(first, std::max(0, first_visible(sights[i].first) - start));
            end = std::max(end, std::min(sights[i].last - start + 1, kChunkPositions));
        }
        const int first_block = first / kBlockPositions, end_block = (end + kBlockPositions - 1) / kBlockPositions;
        if (first_block >= end_block) {
            for (int i = 0; i < num_tiles; ++i) parts[i].clear();
            return;
        }
        if (num_tiles == 2) {
            for (int block = first_block; block < end_block; block += 2) {
                score_pair(tile, start, block, block + 1 < end_block);
            }
        } else {
            for (int block = first_block; block < end_block; block += 4) {
                if (num_tiles_ == 1) prefetch(start, block, std::min(block + 8, end_block));
                score_blocks(tile, start, block, std::min(block + 4, end_block));
            }
        }
        const int first_tile = first_block / 2, end_tile = (end_block + 1) / 2;
        for (int i = 0; i < num_tiles; ++i) {
            hide(scores_[i], sights[i], start, first_block * kBlockPositions, end_block * kBlockPositions);
            soften(i, first_block, end_block, parts[i]);
            if (first_block % 2 != 0) clear_probabilities(i, first_block - 1);
            if (end_block % 2 != 0) clear_probabilities(i, end_block);
        }
        if (num_tiles == 2) {
            for (int d = 0; d < dim_; d += 2 * kColumns) add_values_pair(first_tile, end_tile, d, parts);
        } else {
            for (int d = 0; d < dim_; d += 4 * kColumns) add_values(first_tile, end_tile, d, parts[0].data);
        }
    }

    // Keys of the next four blocks. Only where a tile is alone: others read from the caches.
    void prefetch(int start, int first, int end) const {
        for (int block = first + 4; block < end; ++block) {
            const uint16_t* keys = keys_at(start + block * kBlockPositions);
            for (int i = 0; i < kBlockPositions * dim_; i += 32) {
                _mm_prefetch(reinterpret_cast<const char*>(keys + i), _MM_HINT_T0);
            }
        }
    }

    // Scores [positions, 16] of up to four blocks.
    void score_blocks(int tile, int start, int first, int end) {
        const int64_t row_bytes = dim_ * 2;
        const uint16_t* keys[4];
        for (int i = 0; i < 4; ++i) keys[i] = keys_at(start + std::min(first + i, end - 1) * kBlockPositions);
        zero_sums();
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
        float* to = scores_[0] + first * kBlockPositions * kColumns;
        store_tile<0>(to, 64);
        if (end - first > 1) store_tile<1>(to + 256, 64);
        if (end - first > 2) store_tile<2>(to + 512, 64);
        if (end - first > 3) store_tile<3>(to + 768, 64);
    }

    // Scores of one or two blocks for two tiles of columns.
    void score_pair(int tile, int start, int block, bool has_second) {
        const int64_t row_bytes = dim_ * 2;
        const uint16_t* first = keys_at(start + block * kBlockPositions);
        const uint16_t* second = has_second ? keys_at(start + (block + 1) * kBlockPositions) : first;
        const uint16_t *left = query_tiles(tile), *right = query_tiles(tile + 1);
        zero_sums();
        for (int d = 0; d < dim_; d += 32) {
            load_tile<4>(first + d, row_bytes);
            load_tile<5>(left + d * kColumns, 64);
            multiply_tiles<0, 4, 5>();
            load_tile<5>(right + d * kColumns, 64);
            multiply_tiles<1, 4, 5>();
            load_tile<4>(second + d, row_bytes);
            multiply_tiles<3, 4, 5>();
            load_tile<5>(left + d * kColumns, 64);
            multiply_tiles<2, 4, 5>();
        }
        const int at = block * kBlockPositions * kColumns;
        store_tile<0>(scores_[0] + at, 64);
        store_tile<1>(scores_[1] + at, 64);
        if (!has_second) return;
        store_tile<2>(scores_[0] + at + 256, 64);
        store_tile<3>(scores_[1] + at + 256, 64);
    }

    // Scores to probabilities relative to the chunk's own maximum.
    void soften(int tile, int first_block, int end_block, const PartialSums& part) {
        const int begin = first_block * kBlockPositions, end = end_block * kBlockPositions;
        __m512 maxima[4];
        for (auto& maximum : maxima) maximum = _mm512_set1_ps(kHidden);
        for (int i = begin; i < end; i += 4) {
            for (int j = 0; j < 4; ++j) maxima[j] = _mm512_max_ps(maxima[j], _mm512_load_ps(scores_[tile] + (i + j) * kColumns));
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
            const float* scores = scores_[tile] + i * kColumns;
            const __m512 even = exp2_negative(_mm512_fmsub_ps(_mm512_load_ps(scores), scale, largest));
            const __m512 odd = exp2_negative(_mm512_fmsub_ps(_mm512_load_ps(scores + kColumns), scale, largest));
            sums[0] = _mm512_add_ps(sums[0], even);
            sums[1] = _mm512_add_ps(sums[1], odd);
            const auto pairs = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
            _mm512_store_si512(probabilities_[tile] + i * kColumns, _mm512_permutexvar_epi16(interleave, pairs));
        }
        _mm512_storeu_ps(part.sums(), _mm512_add_ps(sums[0], sums[1]));
        _mm512_storeu_ps(part.maxima(), _mm512_mask_mov_ps(_mm512_set1_ps(kHidden), sees, largest));
    }

    // Caps scores (and scales them, as powers of 2), and overwrites those of positions that a column does not see.
    void hide(float* scores, const Sight& sight, int start, int begin, int end) const {
        if (shape_.softcap > 0.0f) {
            const __m512 in = _mm512_set1_ps(shape_.scale / shape_.softcap);
            const __m512 out = _mm512_set1_ps(shape_.softcap * kLog2E);
            for (int i = begin; i < end; ++i) {
                const __m512 score = _mm512_mul_ps(_mm512_load_ps(scores + i * kColumns), in);
                _mm512_store_ps(scores + i * kColumns, _mm512_mul_ps(avx512::tanh_of(score), out));
            }
        }
        if (start + end - 1 <= sight.first && start + begin >= first_visible(sight.last)) return;
        const __m512i last = _mm512_load_si512(sight.positions), first = _mm512_load_si512(sight.oldest);
        const __m512 hidden = _mm512_set1_ps(kHidden);
        for (int i = begin; i < end; ++i) {
            const __m512i position = _mm512_set1_epi32(start + i);
            const __mmask16 seen = _mm512_cmple_epi32_mask(position, last) & _mm512_cmpge_epi32_mask(position, first);
            float* score = scores + i * kColumns;
            _mm512_store_ps(score, _mm512_mask_mov_ps(hidden, seen, _mm512_load_ps(score)));
        }
    }

    // Of a block that no column sees, beside one that some do.
    void clear_probabilities(int tile, int block) const {
        std::memset(probabilities_[tile] + block * kBlockPositions * kColumns, 0, kBlockPositions * kColumns * 2);
    }

    // part [64 dimensions from d on][16] = values times probabilities, of tiles [first, end) of 32 positions.
    void add_values(int first, int end, int d, float* part) const {
        const int count = std::min(4, (dim_ - d) / 16);
        zero_sums();
        for (int tile = first; tile < end; ++tile) {
            const uint16_t* values = tile_values(tile) + d * kTilePositions;
            load_tile<7>(probabilities_[0] + tile * kTilePositions * kColumns, 64);
            load_tile<6>(values, 64);
            multiply_tiles<0, 6, 7>();
            load_tile<6>(values + 16 * kTilePositions, 64);
            multiply_tiles<1, 6, 7>();
            if (count == 2) continue;
            load_tile<6>(values + 32 * kTilePositions, 64);
            multiply_tiles<2, 6, 7>();
            load_tile<6>(values + 48 * kTilePositions, 64);
            multiply_tiles<3, 6, 7>();
        }
        float* to = part + d * kColumns;
        store_tile<0>(to, 64);
        store_tile<1>(to + 256, 64);
        if (count == 2) return;
        store_tile<2>(to + 512, 64);
        store_tile<3>(to + 768, 64);
    }

    // The same for two tiles of columns: parts [32 dimensions from d on][16] of each.
    void add_values_pair(int first, int end, int d, const PartialSums* parts) const {
        zero_sums();
        for (int tile = first; tile < end; ++tile) {
            const uint16_t* values = tile_values(tile) + d * kTilePositions;
            const int at = tile * kTilePositions * kColumns;
            load_tile<4>(values, 64);
            load_tile<6>(probabilities_[0] + at, 64);
            multiply_tiles<0, 4, 6>();
            load_tile<7>(probabilities_[1] + at, 64);
            multiply_tiles<1, 4, 7>();
            load_tile<5>(values + 16 * kTilePositions, 64);
            multiply_tiles<2, 5, 6>();
            multiply_tiles<3, 5, 7>();
        }
        store_tile<0>(parts[0].data + d * kColumns, 64);
        store_tile<1>(parts[1].data + d * kColumns, 64);
        store_tile<2>(parts[0].data + (d + 16) * kColumns, 64);
        store_tile<3>(parts[1].data + (d + 16) * kColumns, 64);
    }

    const AttentionShape& shape_;
    const ColumnRun& run_;
    const uint16_t* keys_;
    const uint16_t* values_;
    int kv_head_;
    int num_tiles_;
    int dim_;
    int first_position_;
    int last_position_;
    uint16_t* queries_;
    float* totals_;
    // Of the two tiles at hand.
    float* parts_[2];
    float* scores_[2];            // [kChunkPositions][16]
    uint16_t* probabilities_[2];  // [kChunkPositions / 2][16][2]
    uint16_t* chunk_values_;      // see load_values
};

inline bool can_attend(const AttentionShape& shape) {
    return shape.kv_type == KVType::BF16 && shape.block_size % kBlockPositions == 0 && shape.head_dim % 32 == 0;
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

inline void attend(const AttentionShape& shape, const ColumnRun& run, const void* keys, const void* values, int kv_head,
                   float* scratch) {
    HeadColumns(shape, run, keys, values, kv_head, scratch).run();
}

inline void attend_chunk(const AttentionShape& shape, const ColumnRun& run, const void* keys, const void* values,
                         int kv_head, int start, float* parts, float* scratch) {
    HeadColumns(shape, run, keys, values, kv_head, scratch).run_chunk(start, parts);
}

inline void merge_chunks(const AttentionShape& shape, std::span<const ChunkPart> parts, const AttentionColumn* columns,
                         int num_columns, float* scratch) {
    const PartialSums total = {scratch, shape.head_dim};
    total.clear();
    const auto mask = static_cast<__mmask16>((1u << num_columns) - 1);
    for (const ChunkPart& part : parts) total.add({part.data, shape.head_dim}, part.lane, mask);
    total.store(columns, num_columns);
}

}  // namespace pelton::amx
