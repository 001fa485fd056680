// Integer products for the instruction sets below AVX-512: half a panel (16 outputs) times a tile of rows.
//
// Every path adds up a row in the same order: exact integers within a (sub)group, then one multiply-add per
// (sub)group, groups in order. So the number of rows does not change a bit (law 3).
#pragma once

#include <algorithm>

#include "dot_products.h"
#include "kernel_table.h"
#include "packed_groups.h"

namespace pelton::PELTON_ISA {

// Groups unpacked to bytes and floats by `unpack`.
template <Format kFormat>
struct UnpackedGroups {
    static constexpr FormatTraits kTraits = traits_of(kFormat);
    static constexpr int kScaleFloats = kTraits.subgroups * kPanel * (kTraits.has_min ? 2 : 1);
    const uint8_t* values;
    const float* floats;

    UnpackedGroups(const uint8_t* scratch, int num_groups)
        : values(scratch), floats(reinterpret_cast<const float*>(scratch + 1024 * static_cast<size_t>(num_groups))) {}
    void next() {
        values += 1024;
        floats += kScaleFloats;
    }
    void load_pair(int pair, int half, int vector, Bytes& first, Bytes& second) const {
        first = load<Bytes>(values + (4 * pair + half) * 64 + vector * kVectorBytes);
        second = load<Bytes>(values + (4 * pair + 2 + half) * 64 + vector * kVectorBytes);
    }
    Floats scale(int sub, int half, int vector) const {
        return load<Floats>(floats + sub * kPanel + half * kHalf + vector * kLanes);
    }
    Floats minimum(int half, int vector) const {
        return load<Floats>(floats + kTraits.subgroups * kPanel + half * kHalf + vector * kLanes);
    }
};

template <Format kFormat>
void unpack(const uint8_t* panel, int num_groups, uint8_t* scratch) {
    constexpr FormatTraits traits = traits_of(kFormat);
    PackedGroups<kFormat> source(panel);
    uint8_t* values = scratch;
    auto* floats = reinterpret_cast<float*>(scratch + 1024 * static_cast<size_t>(num_groups));
    for (int group = 0; group < num_groups; ++group, source.next(), values += 1024) {
        for (int half = 0; half < 2; ++half) {
            for (int vector = 0; vector < kHalfVectors; ++vector) {
                for (int pair = 0; pair < 4; ++pair) {
                    Bytes first, second;
                    source.load_pair(pair, half, vector, first, second);
                    store(values + (4 * pair + half) * 64 + vector * kVectorBytes, first);
                    store(values + (4 * pair + 2 + half) * 64 + vector * kVectorBytes, second);
                }
                float* to = floats + half * kHalf + vector * kLanes;
                for (int sub = 0; sub < traits.subgroups; ++sub) {
                    store(to + sub * kPanel, source.scale(sub, half, vector));
                }
                if constexpr (traits.has_min) store(to + traits.subgroups * kPanel, source.minimum(half, vector));
            }
        }
        floats += UnpackedGroups<kFormat>::kScaleFloats;
    }
}

// Rows of a tile, at the group that is being multiplied.
struct RowCursor {
    const int8_t* values;  // rows are num_inputs apart
    const float* scales;   // rows are num_groups apart
    const int32_t* sums;   // rows are 2 * num_groups apart
    size_t num_inputs;
    size_t num_groups;
};

// One group times kRows rows, added to half a panel's totals [kRows][kHalf].
template <Format kFormat, class Source, int kRows>
inline void multiply_group(const Source& source, int half, const RowCursor& rows, float (*total)[kPanel]) {
    constexpr FormatTraits traits = traits_of(kFormat);
    constexpr int kPairsPerSub = 4 / traits.subgroups;
    constexpr int kZeroPoint = kSignedWeights && traits.bits == 8 ? traits.zero_point - 128 : traits.zero_point;
    for (int sub = 0; sub < traits.subgroups; ++sub) {
        Dot<traits.bits> dots[kRows][kHalfVectors];
        for (int pair = sub * kPairsPerSub; pair < (sub + 1) * kPairsPerSub; ++pair) {
            for (int vector = 0; vector < kHalfVectors; ++vector) {
                Bytes first, second;
                source.load_pair(pair, half, vector, first, second);
                for (int r = 0; r < kRows; ++r) {
                    dots[r][vector].add(first, rows.values + r * rows.num_inputs + 8 * pair, second);
                }
            }
        }
        for (int r = 0; r < kRows; ++r) {
            const Floats scale = splat(rows.scales[r * rows.num_groups]);
            const int32_t* sums = rows.sums + 2 * r * rows.num_groups;
            const int32_t own = traits.subgroups == 2 ? sums[sub] : sums[0] + sums[1];
            for (int vector = 0; vector < kHalfVectors; ++vector) {
                const Ints exact = dots[r][vector].sum() - splat(kZeroPoint * own);
                float* to = total[r] + half * kHalf + vector * kLanes;
                Floats sum = multiply_add(to_floats(exact), source.scale(sub, half, vector) * scale, load<Floats>(to));
                if constexpr (traits.has_min) {
                    sum = multiply_add(-source.minimum(half, vector), scale * splat(static_cast<float>(own)), sum);
                }
                store(to, sum);
            }
        }
    }
}

template <Format kFormat, class Source, int kRows>
void multiply_tile(Source source, const QuantizedRows& rows, int first_row, const float* bias, int num_columns,
                   float* out, int64_t ld_out) {
    const size_t num_inputs = rows.num_inputs, num_groups = num_inputs / kGroup;
    RowCursor cursor = {rows.values + first_row * num_inputs, rows.scales + first_row * num_groups,
                        rows.sums + 2 * first_row * num_groups, num_inputs, num_groups};
    alignas(64) float total[kRows][kPanel] = {};
    for (size_t group = 0; group < num_groups; ++group, source.next()) {
        multiply_group<kFormat, Source, kRows>(source, 0, cursor, total);
        multiply_group<kFormat, Source, kRows>(source, 1, cursor, total);
        cursor.values += kGroup;
        cursor.scales += 1;
        cursor.sums += 2;
    }
    for (int r = 0; r < kRows; ++r) {
        float* to = out + (first_row + r) * ld_out;
        for (int c = 0; c < num_columns; ++c) to[c] = total[r][c] + (bias != nullptr ? bias[c] : 0.0f);
    }
}

template <Format kFormat, class Source, int kRows>
void multiply_rows(Source source, int num_rows, const QuantizedRows& rows, int first_row, const float* bias,
                   int num_columns, float* out, int64_t ld_out) {
    if constexpr (kRows > 1) {
        if (num_rows < kRows) {
            return multiply_rows<kFormat, Source, kRows - 1>(source, num_rows, rows, first_row, bias, num_columns, out,
                                                             ld_out);
        }
    }
    multiply_tile<kFormat, Source, kRows>(source, rows, first_row, bias, num_columns, out, ld_out);
}

template <Format kFormat>
void multiply_panel(const PackedMatrix& matrix, int panel, const QuantizedRows& rows, const float* bias, float* out,
                    int64_t ld_out, uint8_t* scratch) {
    constexpr int kTileRows = Dot<traits_of(kFormat).bits>::kTileRows;
    using Packed = PackedGroups<kFormat>;
    using Unpacked = UnpackedGroups<kFormat>;
    const int first_column = panel * kPanel;
    const int num_columns = std::min(kPanel, matrix.num_outputs - first_column);
    if (bias != nullptr) bias += first_column;
    out += first_column;
    if (rows.num_rows <= kTileRows) {
        if (rows.num_rows == 0) return;
        return multiply_rows<kFormat, Packed, kTileRows>(Packed(matrix.panel(panel)), rows.num_rows, rows, 0, bias,
                                                         num_columns, out, ld_out);
    }
    unpack<kFormat>(matrix.panel(panel), matrix.num_groups(), scratch);
    const Unpacked source(scratch, matrix.num_groups());
    // Tiles of nearly equal height: 8 rows are 4 + 4, not 6 + 2.
    const int num_tiles = (rows.num_rows + kTileRows - 1) / kTileRows;
    for (int tile = 0; tile < num_tiles; ++tile) {
        const int first = static_cast<int>(static_cast<int64_t>(rows.num_rows) * tile / num_tiles);
        const int last = static_cast<int>(static_cast<int64_t>(rows.num_rows) * (tile + 1) / num_tiles);
        multiply_rows<kFormat, Unpacked, kTileRows>(source, last - first, rows, first, bias, num_columns, out, ld_out);
    }
}

inline void linear_panel(const PackedMatrix& matrix, int panel, const QuantizedRows& rows, const float* bias,
                         float* out, int64_t ld_out, uint8_t* scratch) {
    switch (matrix.format) {
        case Format::Q4_0: return multiply_panel<Format::Q4_0>(matrix, panel, rows, bias, out, ld_out, scratch);
        case Format::Q4_1: return multiply_panel<Format::Q4_1>(matrix, panel, rows, bias, out, ld_out, scratch);
        case Format::Q5_0: return multiply_panel<Format::Q5_0>(matrix, panel, rows, bias, out, ld_out, scratch);
        case Format::Q5_1: return multiply_panel<Format::Q5_1>(matrix, panel, rows, bias, out, ld_out, scratch);
        case Format::Q8_0: return multiply_panel<Format::Q8_0>(matrix, panel, rows, bias, out, ld_out, scratch);
        case Format::Q4_K: return multiply_panel<Format::Q4_K>(matrix, panel, rows, bias, out, ld_out, scratch);
        case Format::Q5_K: return multiply_panel<Format::Q5_K>(matrix, panel, rows, bias, out, ld_out, scratch);
        case Format::Q6_K: return multiply_panel<Format::Q6_K>(matrix, panel, rows, bias, out, ld_out, scratch);
        case Format::INT4: return multiply_panel<Format::INT4>(matrix, panel, rows, bias, out, ld_out, scratch);
        case Format::INT8: return multiply_panel<Format::INT8>(matrix, panel, rows, bias, out, ld_out, scratch);
        default: return;  // dense: dense_panel's
    }
}

}  // namespace pelton::PELTON_ISA
