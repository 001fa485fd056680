// Products of weights by channel in tiles of 8 bits: one scale per output, one per row of activations.
#pragma once

#include "channel_columns_avx512.h"
#include "linear_amx.h"

namespace pelton::amx {

using avx512::kStripBytes;
using avx512::kWeightTileBytes;
using avx512::PlainColumns;
using avx512::Strip;
using avx512::TileColumns;

constexpr int kBlockSums = 2 * kTileHeight * kPanel;  // of a pair of blocks
constexpr int kMadeChunks = 4;                        // made of 4 bits, that wait for a few rows

// sums [rows, 16] of 32 bits += a [rows, 64], signed, times b [16 fours of inputs, 16, 4], unsigned.
template <int kSums, int kA, int kB>
inline void multiply_bytes() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kA), "i"(kB));
}

// A chunk of two blocks of rows, `next_block` bytes apart, times two tiles of weights with rows `stride` bytes apart.
template <bool kTwoBlocks, bool kPassing>
inline void add_chunk(const int8_t* rows, int64_t next_block, const uint8_t* first, const uint8_t* second,
                      int64_t stride) {
    load_tile<6>(first, stride);
    load_tile<7>(second, stride);
    kPassing ? load_passing_tile<4>(rows, kRowBytes) : load_tile<4>(rows, kRowBytes);
    multiply_bytes<0, 4, 6>();
    multiply_bytes<1, 4, 7>();
    if constexpr (kTwoBlocks) {
        kPassing ? load_passing_tile<5>(rows + next_block, kRowBytes) : load_tile<5>(rows + next_block, kRowBytes);
        multiply_bytes<2, 5, 6>();
        multiply_bytes<3, 5, 7>();
    }
}

// Finished sums on their way out, some rows between products: vector units work while tiles do.
template <typename Sink>
struct PendingSums {
    const ByteRows& rows;
    Sink sink;
    const int32_t* sums = nullptr;
    int row = 0;
    int last = 0;

    void set(const Sink& to, const int32_t* from, int first, int count) {
        sink = to;
        sums = from;
        row = first;
        last = first + count;
    }
    void store(int count) {
        count = std::min(count, last - row);
        if (count <= 0) return;
        sink.store(rows, row, count, sums);
        row += count;
        sums += static_cast<int64_t>(count) * kPanel;
    }
};

// Up to 32 rows: codes that are made are multiplied a little later, as a tile that was just stored is slow to load.
template <Format kFormat, bool kTwoBlocks, typename Columns>
void channel_few(const Columns& columns, int num_units, const ByteRows& rows, int32_t* sums, uint8_t* made) {
    constexpr bool kHasSteps = Strip<kFormat>::Groups::kHasSteps;
    constexpr int kBehind = kHasSteps ? kMadeChunks / 2 : 0;
    const int num_chunks = rows.num_chunks();
    for (int unit = 0; unit < num_units; ++unit) {
        zero_sums();
        const TileColumns tiles = columns.tiles(unit);
        const Strip<kFormat> whole{tiles, 0, num_chunks, made};
        const int8_t* values = rows.values;
        for (int chunk = 0; chunk < num_chunks + kBehind; ++chunk) {
            if (chunk >= kBehind) {
                const int place = kHasSteps ? (chunk - kBehind) % kMadeChunks : chunk;
                const int64_t at = static_cast<int64_t>(place) * 2 * kWeightTileBytes;
                add_chunk<kTwoBlocks, false>(values, rows.block_bytes(), whole.tile(0) + at, whole.tile(1) + at,
                                             Strip<kFormat>::kStride);
                values += ByteRows::kTileBytes;
            }
            if constexpr (kHasSteps) {
                if (chunk >= num_chunks) continue;
                Strip<kFormat> one{tiles, chunk, chunk + 1, made + chunk % kMadeChunks * 2 * kWeightTileBytes};
                one.make_next();
                one.make_next();
            } else {
                whole.prefetch_ahead(chunk);
            }
        }
        store_sums<kTwoBlocks>(reinterpret_cast<float*>(sums), kPanel);
        columns.sink(unit).store(rows, 0, rows.num_rows, sums);
    }
}

// More rows: while they all pass by a strip, the next one is made.
template <Format kFormat, typename Columns>
void channel_many(const Columns& columns, int num_units, const ByteRows& rows, int32_t* sums, uint8_t* made) {
    constexpr int kPairHeight = 2 * kTileHeight;
    const int num_chunks = rows.num_chunks();
    const int num_strips = (num_chunks + kStripChunks - 1) / kStripChunks;
    const int num_pairs = (rows.num_rows + kPairHeight - 1) / kPairHeight;
    const auto strip_at = [&](int index) {
        const int strip = index % num_strips;
        return Strip<kFormat>{columns.tiles(index / num_strips), num_chunks * strip / num_strips,
                              num_chunks * (strip + 1) / num_strips, made + index % 2 * kStripBytes};
    };
    auto next = strip_at(0);
    while (next.num_made < next.num_tiles()) next.make_next();
    PendingSums<typename Columns::Sink> pending{rows, columns.sink(0)};
    int turn = 0;
    for (int index = 0; index < num_units * num_strips; ++index) {
        const auto strip = next;
        const bool is_last = index + 1 == num_units * num_strips;
        if (!is_last) next = strip_at(index + 1);
        const int num_left = is_last ? 0 : next.num_tiles();
        const int length = strip.last - strip.first, num_steps = num_pairs * length;
        const int rows_at_once = ((kPairHeight + length - 1) / length + 1) / 2 * 2;
        const bool starts = index % num_strips == 0, ends = index % num_strips == num_strips - 1;
        const auto sink = columns.sink(index / num_strips);
        int due = 0;
        for (int pair = 0; pair < num_pairs; ++pair) {
            // One strip: two places in turn. More: one for every pair of blocks.
            auto* own = sums + (num_strips == 1 ? turn : pair) * kBlockSums;
            turn ^= 1;
            if (starts) {
                zero_sums();
            } else {
                load_sums<true>(reinterpret_cast<const float*>(own), kPanel);
            }
            const int8_t* values = rows.row(pair * kPairHeight) + static_cast<int64_t>(strip.first) * ByteRows::kTileBytes;
            const uint8_t *first = strip.tile(0), *second = strip.tile(1);
            for (int chunk = 0; chunk < length; ++chunk) {
                add_chunk<true, true>(values, rows.block_bytes(), first, second, Strip<kFormat>::kStride);
                pending.store(rows_at_once);
                for (due += num_left; due >= num_steps; due -= num_steps) next.make_next();
                values += ByteRows::kTileBytes;
                first += 2 * kWeightTileBytes;
                second += 2 * kWeightTileBytes;
            }
            store_sums<true>(reinterpret_cast<float*>(own), kPanel);
            if (ends) {
                pending.set(sink, own, pair * kPairHeight, std::min(kPairHeight, rows.num_rows - pair * kPairHeight));
            }
        }
    }
    pending.store(kPairHeight);
}

template <Format kFormat, typename Columns>
void multiply_columns(const Columns& columns, int num_units, const ByteRows& rows, uint8_t* scratch) {
    uint8_t* made = scratch;
    auto* sums = reinterpret_cast<int32_t*>(scratch + 2 * kStripBytes);
    if (!rows.is_few()) {
        configure(kTileHeight, kTileHeight);
        channel_many<kFormat>(columns, num_units, rows, sums, made);
    } else {
        configure(std::min(rows.num_rows, kTileHeight), std::max(rows.num_rows - kTileHeight, 1));
        const bool has_two_blocks = rows.num_rows > kTileHeight;
        const auto few = has_two_blocks ? channel_few<kFormat, true, Columns> : channel_few<kFormat, false, Columns>;
        few(columns, num_units, rows, sums, made);
    }
    release_tiles();
}

template <typename Columns>
void multiply_columns(Format format, const Columns& columns, int num_units, const ByteRows& rows, uint8_t* scratch) {
    const auto multiply = format == Format::INT8_CHANNEL ? multiply_columns<Format::INT8_CHANNEL, Columns>
                                                         : multiply_columns<Format::INT4_CHANNEL, Columns>;
    multiply(columns, num_units, rows, scratch);
}

inline void channel_panels(const PackedMatrix& matrix, PanelRange panels, const ByteRows& rows, const LinearResult& result,
                           uint8_t* scratch) {
    if (rows.num_rows == 1) return avx512::multiply_few(matrix, panels, rows, result);
    multiply_columns(matrix.format, PlainColumns{matrix, panels.first, result}, panels.last - panels.first, rows, scratch);
}

inline void gated_channel_panels(const GatedPanels& gated, PanelRange panels, const ByteRows& rows,
                                 const PairedRows& hidden, uint8_t* scratch) {
    if (rows.num_rows == 1) return avx512::gated_few(gated, panels, rows, hidden);
    multiply_columns(gated.sides[0]->format, avx512::GatedColumns(gated, panels.first, hidden), 2 * (panels.last - panels.first),
                     rows, scratch);
}

}  // namespace pelton::amx
