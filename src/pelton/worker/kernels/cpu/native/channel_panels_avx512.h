// Products by channel with AVX-512 VNNI of more than a few rows: a strip of weights is made once, stays in the
// first-level cache, and rows pass by it, some at a time, with their sums in registers.
#pragma once

#include "channel_columns_avx512.h"
#include "unrolled.h"

namespace pelton::avx512 {

// `strip` times kRows rows from `row` on, added to `sums` [kRows, 32] or, where it is the first, put there. Between
// chunks, `between` is called.
template <Format kFormat, int kRows, typename Between>
void add_strip(const Strip<kFormat>& strip, const ByteRows& rows, int row, bool is_first, int32_t* sums,
               const Between& between) {
    __m512i sum[kRows][2];
    const int8_t* x[kRows];
    unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
        x[r] = rows.row(row + r) + static_cast<int64_t>(strip.first) * ByteRows::kTileBytes;
        for (int side = 0; side < 2; ++side) {
            sum[r][side] = is_first ? _mm512_setzero_si512() : _mm512_load_si512(sums + r * kPanel + 16 * side);
        }
    });
    const uint8_t *first = strip.tile(0), *second = strip.tile(1);
    for (int chunk = strip.first; chunk < strip.last; ++chunk) {
        for (int at = 0; at < kChunk / 4; at += 4) {
            unrolled<4>([&](auto k) __attribute__((always_inline)) {
                const int four = at + k;
                const __m512i codes[2] = {_mm512_loadu_si512(first + four * Strip<kFormat>::kStride),
                                          _mm512_loadu_si512(second + four * Strip<kFormat>::kStride)};
                unrolled<kRows>([&](auto r) __attribute__((always_inline)) { add_dots(sum[r], codes, x[r] + 4 * four); });
            });
        }
        unrolled<kRows>([&](auto r) __attribute__((always_inline)) { x[r] += ByteRows::kTileBytes; });
        first += 2 * kWeightTileBytes;
        second += 2 * kWeightTileBytes;
        between();
    }
    unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
        _mm512_store_si512(sums + r * kPanel, sum[r][0]);
        _mm512_store_si512(sums + r * kPanel + 16, sum[r][1]);
    });
}

template <Format kFormat, typename Between>
void add_strip(const Strip<kFormat>& strip, const ByteRows& rows, int row, int num_rows, bool is_first, int32_t* sums,
               const Between& between) {
    static_assert(kChannelRows == 6);
    switch (num_rows) {
        case 1: return add_strip<kFormat, 1>(strip, rows, row, is_first, sums, between);
        case 2: return add_strip<kFormat, 2>(strip, rows, row, is_first, sums, between);
        case 3: return add_strip<kFormat, 3>(strip, rows, row, is_first, sums, between);
        case 4: return add_strip<kFormat, 4>(strip, rows, row, is_first, sums, between);
        case 5: return add_strip<kFormat, 5>(strip, rows, row, is_first, sums, between);
        default: return add_strip<kFormat, 6>(strip, rows, row, is_first, sums, between);
    }
}

// `scratch`: two strips in turn, and sums of all rows where a panel is more than one strip.
template <Format kFormat, typename Columns>
void multiply_strips(const Columns& columns, int num_units, const ByteRows& rows, uint8_t* scratch) {
    auto* sums = reinterpret_cast<int32_t*>(scratch + 2 * kStripBytes);
    const int num_chunks = rows.num_chunks();
    const int num_strips = (num_chunks + kStripChunks - 1) / kStripChunks;
    // Of nearly equal height, and in pairs, as the rows that come out of a gated layer are.
    const int num_pairs = (rows.num_rows + 1) / 2;
    const int num_tiles = (num_pairs + kChannelRows / 2 - 1) / (kChannelRows / 2);
    const auto row_of = [&](int tile) { return std::min(2 * (num_pairs * tile / num_tiles), rows.num_rows); };
    const auto strip_at = [&](int index) {
        const int strip = index % num_strips;
        return Strip<kFormat>{columns.tiles(index / num_strips), num_chunks * strip / num_strips,
                              num_chunks * (strip + 1) / num_strips, scratch + index % 2 * kStripBytes};
    };
    const int last_index = num_units * num_strips - 1;
    auto next = strip_at(0);
    while (next.num_made < next.num_tiles()) next.make_next();
    for (int index = 0; index <= last_index; ++index) {
        const auto strip = next;
        if (index < last_index) next = strip_at(index + 1);
        const int num_left = index < last_index ? next.num_tiles() : 0;
        const int num_steps = num_tiles * (strip.last - strip.first);
        int due = 0;
        const auto make_some = [&] {
            for (due += num_left; due >= num_steps; due -= num_steps) next.make_next();
        };
        const bool is_first = index % num_strips == 0, is_last = index % num_strips == num_strips - 1;
        const auto sink = columns.sink(index / num_strips);
        for (int tile = 0; tile < num_tiles; ++tile) {
            const int row = row_of(tile), count = row_of(tile + 1) - row;
            auto* own = sums + (num_strips == 1 ? 0 : row) * kPanel;
            add_strip(strip, rows, row, count, is_first, own, make_some);
            if (is_last) sink.store(rows, row, count, own);
        }
    }
}

template <typename Columns>
void multiply_strips(Format format, const Columns& columns, int num_units, const ByteRows& rows, uint8_t* scratch) {
    const auto multiply = format == Format::INT8_CHANNEL ? multiply_strips<Format::INT8_CHANNEL, Columns>
                                                         : multiply_strips<Format::INT4_CHANNEL, Columns>;
    multiply(columns, num_units, rows, scratch);
}

inline void channel_panels(const PackedMatrix& matrix, PanelRange panels, const ByteRows& rows,
                           const LinearResult& result, uint8_t* scratch) {
    if (rows.num_rows <= kFewRows) return multiply_few(matrix, panels, rows, result);
    multiply_strips(matrix.format, PlainColumns{matrix, panels.first, result}, panels.last - panels.first, rows,
                    scratch);
}

inline void gated_channel_panels(const GatedPanels& gated, PanelRange panels, const ByteRows& rows,
                                 const PairedRows& hidden, uint8_t* scratch) {
    if (rows.num_rows <= kFewRows) return gated_few(gated, panels, rows, hidden);
    multiply_strips(gated.sides[0]->format, GatedColumns(gated, panels.first, hidden), 2 * (panels.last - panels.first),
                    rows, scratch);
}

}  // namespace pelton::avx512
