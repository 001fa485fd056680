// Products of weights by channel for the instruction sets below AVX-512: one scale per output, one per row.
//
// A row's sum of integers is exact, and becomes a float in one multiply-add (law 3).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "dot_products.h"
#include "kernel_table.h"
#include "packed_groups.h"
#include "quantized_group.h"
#include "unrolled.h"

namespace pelton::PELTON_ISA {

// A panel's codes of 8 bits, a group at a time: as they lie, or made of 4 bits.
template <Format kFormat>
struct ChannelGroups : PackedGroups<kFormat> {
    typedef uint8_t Narrow __attribute__((vector_size(kLanes)));
    typedef uint16_t Pairs __attribute__((vector_size(4 * kLanes)));
    static constexpr bool kHasSteps = traits_of(kFormat).bits == 4;
    Pairs steps[kPanel / kLanes];  // two to an output
    Bytes bases[kPanel / kLanes];  // four

    explicit ChannelGroups(const uint8_t* panel) : PackedGroups<kFormat>(panel) {}

    // Before the pairs of a group.
    void start() {
        if constexpr (!kHasSteps) return;
        const uint8_t* at = this->group + traits_of(kFormat).low_bytes();
        for (int vector = 0; vector < kPanel / kLanes; ++vector, at += kLanes) {
            steps[vector] = bits_as<Pairs>(__builtin_convertvector(load<Narrow>(at), Words) * 0x00010001u);
            bases[vector] = bits_as<Bytes>(__builtin_convertvector(load<Narrow>(at + kPanel), Words) * 0x01010101u);
        }
    }

    void load_pair(int pair, int vector, Bytes& first, Bytes& second) const {
        PackedGroups<kFormat>::load_pair(pair, vector / kHalfVectors, vector % kHalfVectors, first, second);
        if constexpr (kHasSteps) {
            first = code(first, vector);
            second = code(second, vector);
        }
    }

private:
    // step * q has 8 bits, so that of two in a product of 16 neither reaches the other.
    Bytes code(Bytes q, int vector) const { return bits_as<Bytes>(bits_as<Pairs>(q) * steps[vector]) + bases[vector]; }
};

// What the outliers of a row add to the sums of a panel [kPanel].
template <Format kFormat>
void add_outliers(const uint8_t* panel, const ByteRows& rows, int row, int32_t* sums) {
    const Outlier* outliers = rows.outliers_of(row);
    for (int i = 0; i < rows.num_outliers[row]; ++i) {
        const int input = outliers[i].input, k = input % kGroup;
        ChannelGroups<kFormat> groups(panel + static_cast<int64_t>(input / kGroup) * traits_of(kFormat).group_bytes());
        groups.start();
        int8_t x[8] = {};
        std::memcpy(x + k % 8 / 4 * 4, outliers[i].codes, 4);
        for (int vector = 0; vector < kPanel / kLanes; ++vector) {
            Bytes first, second;
            groups.load_pair(k / 8, vector, first, second);
            Dot<8> dot;
            dot.add(first, x, second);
            int32_t* to = sums + vector * kLanes;
            store(to, load<Ints>(to) + dot.sum() * splat(Outlier::kHighStep));
        }
    }
}

// A panel's columns of the result from the sums of a row [kPanel], which it may change.
template <Format kFormat>
void store_row(const PackedMatrix& matrix, int panel, const ByteRows& rows, int row, int32_t* sums, const LinearResult& result) {
    if (rows.num_outliers[row] != 0) add_outliers<kFormat>(matrix.panel(panel), rows, row, sums);
    const int num_columns = std::min(kPanel, matrix.num_outputs - panel * kPanel);
    const Ints zero = splat(kSignedWeights ? 0 : 128 * rows.sums[row]);
    alignas(64) float total[kPanel];
    for (int i = 0; i < kPanel; i += kLanes) {
        const Floats scale = load<Floats>(matrix.channel_scales(panel) + i) * splat(rows.scales[row]);
        store(total + i, to_floats(load<Ints>(sums + i) - zero) * scale);
    }
    float* to = result.out + (rows.first + row) * result.ld_out + panel * kPanel;
    for (int c = 0; c < num_columns; ++c) to[c] = total[c] + (result.bias != nullptr ? result.bias[panel * kPanel + c] : 0.0f);
}

// One or two rows: codes go from memory straight into products.
template <Format kFormat, int kRows>
void channel_tile(const PackedMatrix& matrix, int panel, const ByteRows& rows, const LinearResult& result) {
    constexpr int kVectors = kPanel / kLanes;
    Dot<8> dots[kRows][kVectors];
    const int8_t* x[kRows];
    for (int r = 0; r < kRows; ++r) x[r] = rows.row(r);
    ChannelGroups<kFormat> groups(matrix.panel(panel));
    for (int group = 0; group < 2 * rows.num_chunks(); ++group, groups.next()) {
        groups.start();
        const int at = group / 2 * ByteRows::kTileBytes + group % 2 * kGroup;
        for (int pair = 0; pair < 4; ++pair) {
            for (int vector = 0; vector < kVectors; ++vector) {
                Bytes first, second;
                groups.load_pair(pair, vector, first, second);
                for (int r = 0; r < kRows; ++r) dots[r][vector].add(first, x[r] + at + 8 * pair, second);
            }
        }
    }
    alignas(64) int32_t sums[kPanel];
    for (int r = 0; r < kRows; ++r) {
        for (int vector = 0; vector < kVectors; ++vector) store(sums + vector * kLanes, dots[r][vector].sum());
        store_row<kFormat>(matrix, panel, rows, r, sums, result);
    }
}

// Chunks [first, last) of a panel as codes of 8 bits, [8 k4][2 halves][64 lanes] to a group: made in `scratch`, or as they lie.
template <Format kFormat>
const uint8_t* made_codes(const PackedMatrix& matrix, int panel, int first, int last, uint8_t* scratch) {
    const int64_t chunk_bytes = 2 * traits_of(kFormat).group_bytes();
    ChannelGroups<kFormat> groups(matrix.panel(panel) + first * chunk_bytes);
    if constexpr (!ChannelGroups<kFormat>::kHasSteps) return groups.group;
    uint8_t* to = scratch;
    for (int group = 2 * first; group < 2 * last; ++group, groups.next(), to += kGroup * kPanel) {
        groups.start();
        for (int pair = 0; pair < 4; ++pair) {
            for (int vector = 0; vector < kPanel / kLanes; ++vector) {
                Bytes codes[2];
                groups.load_pair(pair, vector, codes[0], codes[1]);
                for (int i = 0; i < 2; ++i) store(to + (2 * pair + i) * 4 * kPanel + vector * kVectorBytes, codes[i]);
            }
        }
    }
    return scratch;
}

// Half a panel's codes of `num_chunks` times kRows rows, added to sums [kRows, kPanel] or, where they are the first, put there.
template <int kRows>
void add_codes(const uint8_t* codes, int num_chunks, const int8_t* const* rows, bool is_first, int32_t* sums) {
    Dot<8> dots[kRows][kHalfVectors];
    for (int64_t at = 0; at < static_cast<int64_t>(num_chunks) * ByteRows::kTileBytes; at += ByteRows::kTileBytes) {
        for (int k4 = 0; k4 < kChunk / 4; k4 += 2, codes += 8 * kPanel) {
            Bytes first[kHalfVectors], second[kHalfVectors];
            unrolled<kHalfVectors>([&](auto v) __attribute__((always_inline)) {
                first[v] = load<Bytes>(codes + v * kVectorBytes);
                second[v] = load<Bytes>(codes + 4 * kPanel + v * kVectorBytes);
            });
            unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
                unrolled<kHalfVectors>([&](auto v) __attribute__((always_inline)) {
                    dots[r][v].add(first[v], rows[r] + at + 4 * k4, second[v]);
                });
            });
        }
    }
    unrolled<kRows * kHalfVectors>([&](auto i) __attribute__((always_inline)) {
        constexpr int r = i / kHalfVectors, v = i % kHalfVectors;
        int32_t* to = sums + r * kPanel + v * kLanes;
        store(to, is_first ? dots[r][v].sum() : load<Ints>(to) + dots[r][v].sum());
    });
}

template <int kRows>
void add_codes(const uint8_t* codes, int num_chunks, const int8_t* const* rows, int num_rows, bool is_first, int32_t* sums) {
    if constexpr (kRows > 1) {
        if (num_rows < kRows) return add_codes<kRows - 1>(codes, num_chunks, rows, num_rows, is_first, sums);
    }
    add_codes<kRows>(codes, num_chunks, rows, is_first, sums);
}

// More rows: a strip of codes is made once and stays in the first-level cache while they all pass by.
template <Format kFormat>
void multiply_strips(const PackedMatrix& matrix, int panel, const ByteRows& rows, const LinearResult& result, uint8_t* scratch) {
    constexpr int kTileRows = Dot<8>::kTileRows, kMostChunks = kStripChunks / 2;
    auto* sums = reinterpret_cast<int32_t*>(scratch + kMostChunks * kChunk * kPanel);
    const int num_chunks = rows.num_chunks(), num_strips = (num_chunks + kMostChunks - 1) / kMostChunks;
    // Tiles of nearly equal height: 8 rows are 4 + 4, not 6 + 2.
    const int num_tiles = (rows.num_rows + kTileRows - 1) / kTileRows;
    const auto row_of = [&](int tile) { return static_cast<int>(static_cast<int64_t>(rows.num_rows) * tile / num_tiles); };
    for (int strip = 0; strip < num_strips; ++strip) {
        const int first = num_chunks * strip / num_strips, last = num_chunks * (strip + 1) / num_strips;
        const uint8_t* codes = made_codes<kFormat>(matrix, panel, first, last, scratch);
        for (int tile = 0; tile < num_tiles; ++tile) {
            const int row = row_of(tile), count = row_of(tile + 1) - row;
            const int8_t* x[kTileRows];
            for (int r = 0; r < count; ++r) x[r] = rows.row(row + r) + static_cast<int64_t>(first) * ByteRows::kTileBytes;
            int32_t* own = sums + static_cast<int64_t>(row) * kPanel;
            for (int half = 0; half < 2; ++half) {
                add_codes<kTileRows>(codes + 64 * half, last - first, x, count, strip == 0, own + kHalf * half);
            }
            if (strip + 1 < num_strips) continue;
            for (int r = 0; r < count; ++r) store_row<kFormat>(matrix, panel, rows, row + r, own + r * kPanel, result);
        }
    }
}

template <Format kFormat>
void multiply_channels(const PackedMatrix& matrix, PanelRange panels, const ByteRows& rows, const LinearResult& result,
                       uint8_t* scratch) {
    for (int panel = panels.first; panel < panels.last; ++panel) {
        switch (rows.num_rows) {
            case 0: break;
            case 1: channel_tile<kFormat, 1>(matrix, panel, rows, result); break;
            case 2: channel_tile<kFormat, 2>(matrix, panel, rows, result); break;
            default: multiply_strips<kFormat>(matrix, panel, rows, result, scratch);
        }
    }
}

inline void channel_panels(const PackedMatrix& matrix, PanelRange panels, const ByteRows& rows, const LinearResult& result,
                           uint8_t* scratch) {
    const bool is_int8 = matrix.format == Format::INT8_CHANNEL;
    const auto multiply = is_int8 ? multiply_channels<Format::INT8_CHANNEL> : multiply_channels<Format::INT4_CHANNEL>;
    multiply(matrix, panels, rows, result, scratch);
}

inline void quantize_channel_row(const float* x, const ByteRows& rows, int row) {
    const int num_inputs = rows.num_inputs;
    uint32_t largest = 0;
    for (int i = 0; i < num_inputs; ++i) largest = std::max(largest, float_to_bits(std::abs(x[i])));
    const auto squares_below = [&](float limit) {
        float sum = 0.0f;
        for (int i = 0; i < num_inputs; ++i) sum += std::abs(x[i]) <= limit ? x[i] * x[i] : 0.0f;
        return sum;
    };
    const GroupScale scale = rows.outliers != nullptr
                                 ? scale_of_row(largest, squares_below(bits_to_float(largest)), num_inputs, squares_below)
                                 : scale_of_group(largest);
    int8_t* to = rows.row(row);
    int32_t sum = 0;
    rows.num_outliers[row] = 0;
    for (int start = 0; start < num_inputs; start += kChunk, to += ByteRows::kTileBytes) {
        for (int i = 0; i < kChunk; ++i) {
            const float value = start + i < num_inputs && scale.inverse != 0.0f ? x[start + i] : 0.0f;
            const int code = static_cast<int>(std::nearbyint(value * scale.inverse));
            to[i] = shorten(code, start + i, rows, row);
            sum += code;
        }
    }
    rows.scales[row] = scale.scale;
    rows.sums[row] = sum;
}

}  // namespace pelton::PELTON_ISA
