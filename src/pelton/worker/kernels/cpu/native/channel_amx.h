// Products of weights by channel in tiles of 8 bits: one scale per output, one per row of activations.
#pragma once

#include "channel_avx512.h"
#include "linear_amx.h"

namespace pelton::amx {

constexpr int kChunkWeightBytes = kChunk * kPanel;
constexpr int kSumStride = kPanel * 4;
constexpr int kBlockSums = 2 * kTileHeight * kPanel;  // of a pair of blocks
constexpr int kMadeChunks = 4;                        // made of 4 bits, that wait for a few rows

// sums [rows, 16] of 32 bits += a [rows, 64], signed, times b [16 fours of inputs, 16, 4], unsigned.
template <int kSums, int kA, int kB>
inline void multiply_bytes() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kA), "i"(kB));
}

// A chunk of two blocks of rows, `next_block` bytes apart, times one of a panel.
template <bool kTwoBlocks, bool kPassing>
inline void add_chunk(const int8_t* rows, int64_t next_block, const uint8_t* weights) {
    load_tile<6>(weights, 2 * kRowBytes);
    load_tile<7>(weights + kRowBytes, 2 * kRowBytes);
    kPassing ? load_passing_tile<4>(rows, kRowBytes) : load_tile<4>(rows, kRowBytes);
    multiply_bytes<0, 4, 6>();
    multiply_bytes<1, 4, 7>();
    if constexpr (kTwoBlocks) {
        kPassing ? load_passing_tile<5>(rows + next_block, kRowBytes) : load_tile<5>(rows + next_block, kRowBytes);
        multiply_bytes<2, 5, 6>();
        multiply_bytes<3, 5, 7>();
    }
}

// Finished sums on their way to the result, some rows between products: vector units work while tiles do.
struct PendingSums {
    const avx512::ChannelColumns* columns;
    const ByteRows& rows;
    const int32_t* sums = nullptr;
    int row = 0;
    int last = 0;

    void set(const int32_t* from, int first, int count) {
        sums = from - static_cast<int64_t>(first) * kPanel;
        row = first;
        last = first + count;
    }
    void store(int count) {
        for (const int end = std::min(row + count, last); row < end; ++row) {
            for (int half = 0; half < 2; ++half) {
                columns->store(rows, row, half, _mm512_load_si512(sums + static_cast<int64_t>(row) * kPanel + 16 * half));
            }
        }
    }
};

// The next chunk of a panel as tiles take it.
template <Format kFormat>
inline void make_chunk(avx512::ChannelGroups<kFormat>& groups, uint8_t* to) {
    for (int group = 0; group < kChunk / kGroup; ++group, groups.next()) {
        groups.start();
        for (int pair = 0; pair < 4; ++pair, to += 4 * 64) {
            for (int half = 0; half < 2; ++half) {
                __m512i codes[2];
                groups.load_pair(pair, half, codes[0], codes[1]);
                _mm512_store_si512(to + half * 64, codes[0]);
                _mm512_store_si512(to + (2 + half) * 64, codes[1]);
            }
        }
    }
}

// Up to 32 rows: codes that are made are multiplied a little later, as a tile that was just stored is slow to load.
template <Format kFormat, bool kTwoBlocks>
void channel_few(const PackedMatrix& matrix, PanelRange panels, const ByteRows& rows, const LinearResult& result,
                 int32_t* sums, uint8_t* made) {
    using Groups = avx512::ChannelGroups<kFormat>;
    constexpr int kBehind = Groups::kHasSteps ? kMadeChunks / 2 : 0;
    const int num_chunks = rows.num_chunks();
    for (int panel = panels.first; panel < panels.last; ++panel) {
        zero_sums();
        Groups groups(matrix.panel(panel));
        const int8_t* values = rows.values;
        for (int chunk = 0; chunk < num_chunks + kBehind; ++chunk) {
            if (chunk >= kBehind) {
                const uint8_t* weights = groups.group;
                if constexpr (Groups::kHasSteps) weights = made + (chunk - kBehind) % kMadeChunks * kChunkWeightBytes;
                add_chunk<kTwoBlocks, false>(values, rows.block_bytes(), weights);
                values += ByteRows::kTileBytes;
            }
            if constexpr (!Groups::kHasSteps) {
                groups.next();
                groups.next();
            } else if (chunk < num_chunks) {
                make_chunk(groups, made + chunk % kMadeChunks * kChunkWeightBytes);
            }
        }
        store_sums<kTwoBlocks>(reinterpret_cast<float*>(sums), kPanel);
        const avx512::ChannelColumns columns(matrix, panel, result);
        PendingSums pending{&columns, rows};
        pending.set(sums, 0, rows.num_rows);
        pending.store(rows.num_rows);
    }
}

template <Format kFormat>
void channel_many(const PackedMatrix& matrix, int panel, const ByteRows& rows, const LinearResult& result, int32_t* sums,
                  uint8_t* made) {
    const int num_chunks = rows.num_chunks();
    const int num_strips = (num_chunks + kStripChunks - 1) / kStripChunks;
    const avx512::ChannelColumns columns(matrix, panel, result);
    PendingSums pending{&columns, rows};
    avx512::ChannelGroups<kFormat> groups(matrix.panel(panel));
    for (int strip = 0; strip < num_strips; ++strip) {
        const int first = num_chunks * strip / num_strips, last = num_chunks * (strip + 1) / num_strips;
        const int rows_at_once = (2 * kTileHeight + last - first - 1) / (last - first);
        const uint8_t* strip_weights = groups.group;
        if constexpr (avx512::ChannelGroups<kFormat>::kHasSteps) {
            strip_weights = made;
            for (int chunk = first; chunk < last; ++chunk) make_chunk(groups, made + (chunk - first) * kChunkWeightBytes);
        } else {
            groups.group += static_cast<int64_t>(last - first) * kChunkWeightBytes;
        }
        for (int row = 0; row < rows.num_rows; row += 2 * kTileHeight) {
            // One strip: two places in turn. More: one for every pair of blocks.
            const int pair = row / (2 * kTileHeight);
            auto* own = sums + (num_strips == 1 ? pair % 2 : pair) * kBlockSums;
            if (strip == 0) {
                zero_sums();
            } else {
                load_sums<true>(reinterpret_cast<const float*>(own), kPanel);
            }
            const int8_t* values = rows.row(row) + static_cast<int64_t>(first) * ByteRows::kTileBytes;
            const uint8_t* weights = strip_weights;
            for (int chunk = first; chunk < last; ++chunk) {
                add_chunk<true, true>(values, rows.block_bytes(), weights);
                pending.store(rows_at_once);
                values += ByteRows::kTileBytes;
                weights += kChunkWeightBytes;
            }
            store_sums<true>(reinterpret_cast<float*>(own), kPanel);
            if (strip == num_strips - 1) pending.set(own, row, std::min(2 * kTileHeight, rows.num_rows - row));
        }
    }
    pending.store(2 * kTileHeight);
}

template <Format kFormat>
void multiply_channels(const PackedMatrix& matrix, PanelRange panels, const ByteRows& rows, const LinearResult& result,
                       uint8_t* made, int32_t* sums) {
    if (rows.is_few()) {
        configure(std::min(rows.num_rows, kTileHeight), std::max(rows.num_rows - kTileHeight, 1));
        const auto few = rows.num_rows > kTileHeight ? channel_few<kFormat, true> : channel_few<kFormat, false>;
        few(matrix, panels, rows, result, sums, made);
    } else {
        configure(kTileHeight, kTileHeight);
        for (int panel = panels.first; panel < panels.last; ++panel) {
            channel_many<kFormat>(matrix, panel, rows, result, sums, made);
        }
    }
    release_tiles();
}

inline void channel_panels(const PackedMatrix& matrix, PanelRange panels, const ByteRows& rows, const LinearResult& result,
                           uint8_t* scratch) {
    if (rows.num_rows == 1) return avx512::channel_panels(matrix, panels, rows, result, scratch);
    auto* sums = reinterpret_cast<int32_t*>(scratch + kStripChunks * kChunkWeightBytes);
    const bool is_int8 = matrix.format == Format::INT8_CHANNEL;
    const auto multiply = is_int8 ? multiply_channels<Format::INT8_CHANNEL> : multiply_channels<Format::INT4_CHANNEL>;
    multiply(matrix, panels, rows, result, scratch, sums);
}

// Values [num_inputs / 32][16][32] of tiles of bfloat16, of which `row` is the first of a row.
struct TileRow {
    const uint16_t* row;

    __m512 operator()(int start) const {
        const auto* at = row + start / 32 * kTileValues + start % 32;
        const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    }
};

// Within each four inputs the order of tiles is (0, 3, 1, 2): puts codes back in theirs.
inline void restore_order(int num_inputs, int8_t* codes) {
    alignas(16) static constexpr int8_t kBack[16] = {0, 2, 3, 1, 4, 6, 7, 5, 8, 10, 11, 9, 12, 14, 15, 13};
    const __m128i back = _mm_load_si128(reinterpret_cast<const __m128i*>(kBack));
    for (int start = 0; start < num_inputs; start += kChunk, codes += ByteRows::kTileBytes) {
        for (int i = 0; i < kChunk; i += 16) {
            auto* at = reinterpret_cast<__m128i*>(codes + i);
            _mm_storeu_si128(at, _mm_shuffle_epi8(_mm_loadu_si128(at), back));
        }
    }
}

inline bool quantize_tile_row(const uint16_t* row, int num_inputs, int8_t* to, float* scale, int32_t* sum) {
    const bool wants_rest = avx512::quantize_channel(TileRow{row}, num_inputs, to, scale, sum);
    restore_order(num_inputs, to);
    return wants_rest;
}

inline void quantize_tile_rest(const uint16_t* row, int num_inputs, int8_t* to, float* scale, int32_t* sum) {
    avx512::quantize_rest(TileRow{row}, num_inputs, to, scale, sum);
    restore_order(num_inputs, to);
}

}  // namespace pelton::amx
