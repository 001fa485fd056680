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

#include "activation_avx512.h"
#include "attention_schedule.h"
#include "partial_sums_amx.h"
#include "tile_registers.h"
#include "tiles.h"
#include "transpose_avx512.h"
#include "upcoming_lines.h"

namespace pelton::amx {

constexpr int kBlockPositions = 16;  // positions a tile of keys has
constexpr int kTilePositions = 32;   // and one of values
using avx512::kLog2E;

// Every processor with tiles has these instructions. Not a flag for the whole file: what it shares with the file of plain
// AVX-512 could then come out with them.
#define PELTON_VBMI __attribute__((target("avx512vbmi")))

// Powers of 2 for x <= 0 as bfloat16, made of integers: while tiles multiply, one port is left for vectors of floats, and
// two for integers.
//
// x rounded to 1/256 has its whole part where a bfloat16 has its exponent, one bit higher; a table bends the straight
// line between two powers. Within 0.7%, 0.2% on average (rounding to bfloat16: 0.4% and 0.16%), and exactly 1 at 0.
// What is smaller than 2^-126 counts as 0 wherever bfloat16 is multiplied.
class PowersOfTwo {
public:
    // Of 16 columns at two positions: pairs [16][2].
    PELTON_VBMI __m512i operator()(__m512 even, __m512 odd) const {
        const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, fixed(even), _mm512_bslli_epi128(fixed(odd), 2));
        const __m512i index = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(kBits2To7), both);
        const __m512i bend = _mm512_maskz_permutexvar_epi8(0x5555555555555555, index, table_);
        return _mm512_srli_epi16(_mm512_add_epi16(both, bend), 1);
    }

private:
    static constexpr int kLift = 32;  // makes what the table holds positive
    static constexpr int64_t kBits2To7 = 0x0032002200120002;  // of every word, into its low byte
    // 256 * (2^(f / 256) - 1) - f + 1 + kLift, for the last 8 bits f of 256 * x, four to an entry, from f = kLift on.
    alignas(64) static constexpr uint8_t kTable[64] = {
        23, 22, 21, 21, 20, 19, 18, 17, 17, 16, 15, 15, 14, 14, 13, 13, 12, 12, 12, 11, 11, 11,
        11, 11, 11, 10, 10, 11, 11, 11, 11, 11, 11, 12, 12, 13, 13, 13, 14, 15, 15, 16, 17, 18,
        18, 19, 20, 21, 22, 24, 25, 26, 27, 29, 30, 32, 32, 31, 30, 29, 27, 26, 25, 24};

    // 256 * (x + 127) - kLift in the low half of each word.
    static __m512i fixed(__m512 x) {
        constexpr float kUnit = 49152.0f;  // 2^15 and a half: the last bit of a sum is 1/256
        const __m512 sum = _mm512_add_ps(x, _mm512_set1_ps(kUnit + 127.0f - kLift / 256.0f));
        return _mm512_max_epi32(_mm512_castps_si512(sum), _mm512_castps_si512(_mm512_set1_ps(kUnit)));
    }

    __m512i table_ = _mm512_load_si512(kTable);
};

// Columns that see the same blocks.
//
// Tiles of columns are taken in pairs, which share what is loaded of keys and values. Vector units and tiles work at the
// same time: a pair's scores turn into probabilities while tiles write the next pair's in their place, 32 positions
// behind, and its values are added up while the next pair's maxima are found.
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
          dim_(shape.head_dim),
          scale_(_mm512_set1_ps(shape.softcap > 0.0f ? 1.0f : shape.scale * kLog2E)),
          upcoming_(shape, run.upcoming, keys, values) {
        const auto take = [&scratch](int64_t num_floats) {
            float* part = scratch;
            scratch += num_floats;
            return part;
        };
        queries_ = reinterpret_cast<uint16_t*>(take(static_cast<int64_t>(num_tiles_) * dim_ * kColumns / 2));
        totals_ = take(num_tiles_ * PartialSums::num_floats(dim_));
        parts_ = take(2 * PartialSums::num_floats(dim_));
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
        const int first = first_visible(first_position_) / kChunkPositions * kChunkPositions;
        for (int start = first; start <= last_position_; start += kChunkPositions) {
            // The first one's sums are the totals: to add them to nothing would leave their bits as they are.
            add_chunk(
                start, [&](int tile) { return start == first ? total(tile) : part_at(parts_, tile % 2); },
                [&](int tile, const PartialSums& part) {
                    if (start != first) total(tile).add(part, 0, 0xffff);
                });
        }
        for (int tile = 0; tile < num_tiles_; ++tile) {
            total(tile).store(run_.columns + tile * kColumns, num_columns(tile));
        }
        release_tiles();
    }

    // What the chunk at `start` adds, to parts [tiles].
    void run_chunk(int start, float* parts) {
        begin();
        add_chunk(
            start, [this, parts](int tile) { return part_at(parts, tile); }, [](int, const PartialSums&) {});
        release_tiles();
    }

private:
    // Tiles of 32 positions of a chunk that any column sees.
    struct Extent {
        int start;
        int first;
        int end;

        int num_tiles() const { return end - first; }
    };

    // The largest scores of up to two tiles of columns, in two strands.
    struct Peaks {
        __m512 of[2][2];

        Peaks() {
            for (auto& tile : of) tile[0] = tile[1] = _mm512_set1_ps(kHidden);
        }
    };

    // Of up to two tiles of columns: the maxima to subtract, and the probabilities' sums in order of position.
    struct Softmax {
        __m512 largest[2];
        __m512 sums[2];
    };

    // Registers 0..3 sum; 4 and 5 are keys and queries, or values, 6 and 7 values and probabilities.
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
    PartialSums part_at(float* parts, int index) const {
        return {parts + index * PartialSums::num_floats(dim_), dim_};
    }
    PartialSums total(int tile) const { return part_at(totals_, tile); }
    uint16_t* query_tiles(int tile) const { return queries_ + static_cast<int64_t>(tile) * dim_ * kColumns; }
    uint16_t* value_tile(int tile) const { return chunk_values_ + static_cast<int64_t>(tile) * dim_ * kTilePositions; }

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

    // Where a chunk's keys are. Next to blocks that some column sees: one of those, whose scores will be hidden.
    void find_keys(const Extent& extent) {
        const int first = first_visible(first_position_) / kBlockPositions, last = last_position_ / kBlockPositions;
        for (int i = 2 * extent.first; i < 2 * extent.end; ++i) {
            const int block = std::clamp(extent.start / kBlockPositions + i, first, last);
            chunk_keys_[i] = keys_at(block * kBlockPositions);
        }
    }

    Extent extent_of(int start) const {
        const int first = std::max(0, first_visible(first_position_) - start);
        const int end = std::min(last_position_ + 1 - start, kChunkPositions);
        return {start, first / kTilePositions, std::max(end + kTilePositions - 1, 0) / kTilePositions};
    }

    // Values of a chunk, [kChunkPositions / 32][D][32], with zeros around those that some column sees. Slots out of the
    // columns' window or not written yet may hold anything, NaN too, and 0 times NaN would reach the result.
    void load_values(const Extent& extent) {
        for (int tile = extent.first; tile < extent.end; ++tile) {
            const int position = extent.start + tile * kTilePositions;
            const __mmask16 first_mask = seen_mask(position), second_mask = seen_mask(position + kBlockPositions);
            const uint16_t* first = values_near(position, first_mask);
            const uint16_t* second = values_near(position + kBlockPositions, second_mask);
            auto* to = reinterpret_cast<__m512i*>(value_tile(tile));
            for (int d = 0; d < dim_; d += 8) {
                for (int i = 0; i < 8; ++i, first += shape_.block_size, second += shape_.block_size, ++to) {
                    const __m256i low = _mm256_maskz_loadu_epi16(first_mask, first);
                    const __m256i high = _mm256_maskz_loadu_epi16(second_mask, second);
                    _mm512_store_si512(to, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
                }
                upcoming_.fetch(6);  // 3/8 of the lines of as many positions; scores and softmax fetch the others
            }
        }
    }

    // Which of 16 positions some column sees.
    __mmask16 seen_mask(int position) const {
        const uint32_t before =
            (1u << std::clamp(first_visible(first_position_) - position, 0, kBlockPositions)) - 1;
        const uint32_t written = (1u << std::clamp(last_position_ + 1 - position, 0, kBlockPositions)) - 1;
        return static_cast<__mmask16>(written & ~before);
    }

    // Where a block's values are; anything that may be pointed to where none of them is seen.
    const uint16_t* values_near(int position, __mmask16 mask) const { return mask == 0 ? values_ : values_at(position); }

    // What the chunk adds to each tile: to `part_of` it, then `done` with it.
    template <class PartOf, class Done>
    void add_chunk(int start, const PartOf& part_of, const Done& done) {
        const Extent extent = extent_of(start);
        if (extent.num_tiles() <= 0) {
            for (int tile = 0; tile < num_tiles_; ++tile) {
                part_of(tile).clear();
                done(tile, part_of(tile));
            }
            return;
        }
        find_keys(extent);
        load_values(extent);
        const int num_paired = num_tiles_ / 2 * 2;
        Peaks peaks;
        if (num_paired > 0) {
            for (int i = extent.first; i < extent.end; ++i) {
                for (int d = 0; d < dim_; d += 32) score_pair(0, i, d);
            }
            for (int i = 0; i < 2; ++i) hide(i, i, extent);
            find_peaks(2, extent.first * kTilePositions, extent.end * kTilePositions, peaks);
        }
        for (int tile = 0; tile < num_paired; tile += 2) {
            const PartialSums parts[2] = {part_of(tile), part_of(tile + 1)};
            const bool has_next = tile + 2 < num_paired;
            Softmax softmax = begin_softmax(2, peaks);
            for (int i = extent.first; i < extent.end; ++i) {
                for (int d = 0; d < dim_; d += 32) {
                    for (int side = 0; side < 2; ++side) soften(side, share_of(i, d), share_of(i, d + 32), softmax);
                    if (has_next) score_pair(tile + 2, i, d);
                }
            }
            end_softmax(2, peaks, softmax, parts);
            peaks = Peaks();
            for (int i = 0; has_next && i < 2; ++i) hide(i, tile + 2 + i, extent);
            for (int d = 0; d < dim_; d += 32) {
                zero_sums();
                for (int i = extent.first; i < extent.end; ++i) {
                    add_values_pair(i, d);
                    if (has_next) find_peaks(2, share_of(i, d), share_of(i, d + 32), peaks);
                }
                store_values_pair(d, parts);
            }
            for (int i = 0; i < 2; ++i) done(tile + i, parts[i]);
        }
        if (num_paired < num_tiles_) {
            add_single(num_paired, extent, part_of(num_paired));
            done(num_paired, part_of(num_paired));
        }
    }

    // One tile of columns alone, as decodes have it: bound by memory, so that what comes next is fetched all along.
    void add_single(int tile, const Extent& extent, const PartialSums& part) {
        const int first = extent.first * kTilePositions, end = extent.end * kTilePositions;
        for (int i = extent.first; i < extent.end; i += 2) {
            score_single(tile, i, std::min(i + 2, extent.end));
        }
        hide(0, tile, extent);
        Peaks peaks;
        find_peaks(1, first, end, peaks);
        Softmax softmax = begin_softmax(1, peaks);
        for (int at = first; at < end; at += kTilePositions) {
            for (int i = 0; i < kTilePositions; i += 8) {
                soften(0, at + i, at + i + 8, softmax);
                upcoming_.fetch(dim_ * 3 / 16);
            }
        }
        end_softmax(1, peaks, softmax, &part);
        for (int d = 0; d < dim_; d += 4 * kColumns) add_values(extent, d, part.data);
    }

    // Vector units' share of a tile of positions while tiles take 32 dimensions: from which position on.
    int share_of(int tile, int d) const { return tile * kTilePositions + d * (kTilePositions / 2) / dim_ * 2; }

    // Scores [positions, 16] of up to two tiles of positions.
    void score_single(int tile, int first, int end) {
        const int64_t row_bytes = dim_ * 2;
        const bool has_second = first + 1 < end;
        const uint16_t* const* keys = chunk_keys_ + 2 * first;
        zero_sums();
        const uint16_t* queries = query_tiles(tile);
        for (int d = 0; d < dim_; d += 32) {
            load_tile<5>(queries + d * kColumns, 64);
            load_tile<4>(keys[0] + d, row_bytes);
            multiply_tiles<0, 4, 5>();
            upcoming_.fetch(8);
            load_tile<4>(keys[1] + d, row_bytes);
            multiply_tiles<1, 4, 5>();
            upcoming_.fetch(8);
            if (!has_second) continue;
            load_tile<4>(keys[2] + d, row_bytes);
            multiply_tiles<2, 4, 5>();
            upcoming_.fetch(8);
            load_tile<4>(keys[3] + d, row_bytes);
            multiply_tiles<3, 4, 5>();
            upcoming_.fetch(8);
        }
        float* to = scores_[0] + first * kTilePositions * kColumns;
        store_tile<0>(to, 64);
        store_tile<1>(to + 256, 64);
        if (!has_second) return;
        store_tile<2>(to + 512, 64);
        store_tile<3>(to + 768, 64);
    }

    // Scores of a tile of positions for two tiles of columns, 32 dimensions of them at a time.
    void score_pair(int tile, int i, int d) {
        const int64_t row_bytes = dim_ * 2;
        if (d == 0) zero_sums();
        load_tile<4>(chunk_keys_[2 * i] + d, row_bytes);
        load_tile<6>(query_tiles(tile) + d * kColumns, 64);
        multiply_tiles<0, 4, 6>();
        load_tile<7>(query_tiles(tile + 1) + d * kColumns, 64);
        multiply_tiles<1, 4, 7>();
        load_tile<5>(chunk_keys_[2 * i + 1] + d, row_bytes);
        multiply_tiles<2, 5, 6>();
        multiply_tiles<3, 5, 7>();
        if (d + 32 < dim_) return;
        const int at = i * kTilePositions * kColumns;
        store_tile<0>(scores_[0] + at, 64);
        store_tile<1>(scores_[1] + at, 64);
        store_tile<2>(scores_[0] + at + 256, 64);
        store_tile<3>(scores_[1] + at + 256, 64);
    }

    // Caps the scores at `place` (and scales them, as powers of 2), and overwrites those of positions that a column of
    // `tile` does not see.
    void hide(int place, int tile, const Extent& extent) const {
        float* scores = scores_[place];
        const int begin = extent.first * kTilePositions, end = extent.end * kTilePositions;
        if (shape_.softcap > 0.0f) {
            const __m512 in = _mm512_set1_ps(shape_.scale / shape_.softcap);
            const __m512 out = _mm512_set1_ps(shape_.softcap * kLog2E);
            for (int i = begin; i < end; ++i) {
                const __m512 score = _mm512_mul_ps(_mm512_load_ps(scores + i * kColumns), in);
                _mm512_store_ps(scores + i * kColumns, _mm512_mul_ps(avx512::tanh_of(score), out));
            }
        }
        // What all columns see stays as it is.
        const int first_seen = std::clamp(first_visible(last_position_) - extent.start, begin, end);
        const int last_seen = std::clamp(first_position_ + 1 - extent.start, first_seen, end);
        if (first_seen == begin && last_seen == end) return;
        alignas(64) int newest[kColumns], oldest[kColumns];
        for (int i = 0; i < kColumns; ++i) {
            const bool is_column = i < num_columns(tile) && run_.columns[tile * kColumns + i].query != nullptr;
            newest[i] = is_column ? run_.columns[tile * kColumns + i].position : -1;
            oldest[i] = is_column ? first_visible(newest[i]) : 0;
        }
        const __m512i last = _mm512_load_si512(newest), first = _mm512_load_si512(oldest);
        const __m512 hidden = _mm512_set1_ps(kHidden);
        const auto hide_some = [&](int from, int to) {
            for (int i = from; i < to; ++i) {
                const __m512i position = _mm512_set1_epi32(extent.start + i);
                const __mmask16 seen = _mm512_cmple_epi32_mask(position, last) & _mm512_cmpge_epi32_mask(position, first);
                float* score = scores + i * kColumns;
                _mm512_store_ps(score, _mm512_mask_mov_ps(hidden, seen, _mm512_load_ps(score)));
            }
        };
        hide_some(begin, first_seen);
        hide_some(last_seen, end);
    }

    void find_peaks(int num_tiles, int begin, int end, Peaks& peaks) const {
        for (int tile = 0; tile < num_tiles; ++tile) {
            __m512 even = peaks.of[tile][0], odd = peaks.of[tile][1];
            for (int i = begin; i < end; i += 2) {
                const float* scores = scores_[tile] + i * kColumns;
                even = _mm512_max_ps(even, _mm512_load_ps(scores));
                odd = _mm512_max_ps(odd, _mm512_load_ps(scores + kColumns));
            }
            peaks.of[tile][0] = even;
            peaks.of[tile][1] = odd;
        }
    }

    // A column that sees nothing here gets probabilities of 0 and leaves its maximum as it is.
    static __mmask16 sees_any(__m512 peak) {
        return _mm512_cmp_ps_mask(peak, _mm512_set1_ps(kHidden), _CMP_NLE_UQ);
    }

    Softmax begin_softmax(int num_tiles, const Peaks& peaks) const {
        Softmax softmax;
        for (int tile = 0; tile < num_tiles; ++tile) {
            const __m512 peak = _mm512_max_ps(peaks.of[tile][0], peaks.of[tile][1]);
            softmax.largest[tile] = _mm512_maskz_mul_ps(sees_any(peak), peak, scale_);
            softmax.sums[tile] = _mm512_setzero_ps();
        }
        return softmax;
    }

    // Scores of positions [begin, end), both even, to probabilities relative to the chunk's own maximum.
    PELTON_VBMI void soften(int tile, int begin, int end, Softmax& softmax) const {
        const PowersOfTwo powers;
        const auto ones = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80));
        // In registers: stores below may, for all a compiler knows, change what is in memory.
        const __m512 scale = scale_, largest = softmax.largest[tile];
        __m512 sum = softmax.sums[tile];
        const float* scores = scores_[tile];
        uint16_t* probabilities = probabilities_[tile];
#pragma GCC unroll 4
        for (int i = begin; i < end; i += 2) {
            const auto exponent = [&](int position) {
                return _mm512_fmsub_ps(_mm512_load_ps(scores + position * kColumns), scale, largest);
            };
            const __m512i pairs = powers(exponent(i), exponent(i + 1));
            sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(pairs), ones);
            _mm512_store_si512(probabilities + i * kColumns, pairs);
        }
        softmax.sums[tile] = sum;
    }

    void end_softmax(int num_tiles, const Peaks& peaks, const Softmax& softmax, const PartialSums* parts) const {
        for (int tile = 0; tile < num_tiles; ++tile) {
            const __m512 peak = _mm512_max_ps(peaks.of[tile][0], peaks.of[tile][1]);
            _mm512_store_ps(parts[tile].sums(), softmax.sums[tile]);
            _mm512_store_ps(parts[tile].maxima(),
                            _mm512_mask_mov_ps(_mm512_set1_ps(kHidden), sees_any(peak), softmax.largest[tile]));
        }
    }

    // part [64 dimensions from d on][16] = values times probabilities.
    void add_values(const Extent& extent, int d, float* part) const {
        const int count = std::min(4, (dim_ - d) / 16);
        zero_sums();
        for (int tile = extent.first; tile < extent.end; ++tile) {
            const uint16_t* values = value_tile(tile) + d * kTilePositions;
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

    // Sums of 32 dimensions from d on for two tiles of columns: one tile of positions more.
    void add_values_pair(int tile, int d) const {
        const uint16_t* values = value_tile(tile) + d * kTilePositions;
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

    static void store_values_pair(int d, const PartialSums* parts) {
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
    __m512 scale_;
    avx512::UpcomingLines upcoming_;
    int first_position_;
    int last_position_;
    uint16_t* queries_;
    float* totals_;
    float* parts_;  // of the two tiles at hand
    float* scores_[2];            // [kChunkPositions][16]
    uint16_t* probabilities_[2];  // [kChunkPositions / 2][16][2]
    uint16_t* chunk_values_;      // see load_values
    const uint16_t* chunk_keys_[kChunkPositions / kBlockPositions];
};

inline bool can_attend(const AttentionShape& shape) {
    return shape.kv_type == KVType::BF16 && shape.block_size % kBlockPositions == 0 && shape.head_dim % 32 == 0;
}

// Keys [block_size, D], values [D, block_size].
inline void store_head(const AttentionShape& shape, const float* key, const float* value, int offset, void* keys, void* values) {
    const int dim = shape.head_dim, block_size = shape.block_size;
    auto* own_key = static_cast<uint16_t*>(keys) + static_cast<int64_t>(offset) * dim;
    auto* own_value = static_cast<uint16_t*>(values) + offset;
    const auto rounded = [](const float* from) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(from))); };
    for (int d = 0; d < dim; d += 16) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(own_key + d), rounded(key + d));
        alignas(32) uint16_t column[16];
        _mm256_store_si256(reinterpret_cast<__m256i*>(column), rounded(value + d));
        for (int i = 0; i < 16; ++i) own_value[static_cast<int64_t>(d + i) * block_size] = column[i];
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
