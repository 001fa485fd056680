// Products of weights by channel for the instruction sets below AVX-512: one scale per output, one per row.
//
// A row's sum of integers is exact, and becomes a float in one multiply-add (law 3).
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "dot_products.h"
#include "kernel_table.h"
#include "packed_groups.h"
#include "quantized_group.h"

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

template <Format kFormat, int kRows>
void channel_tile(const PackedMatrix& matrix, int panel, const ByteRows& rows, int first_row, const LinearResult& result) {
    constexpr int kVectors = kPanel / kLanes;
    const int num_columns = std::min(kPanel, matrix.num_outputs - panel * kPanel);
    Dot<8> dots[kRows][kVectors];
    ChannelGroups<kFormat> groups(matrix.panel(panel));
    for (int group = 0; group < 2 * rows.num_chunks(); ++group, groups.next()) {
        groups.start();
        const int at = group / 2 * ByteRows::kTileBytes + group % 2 * kGroup;
        for (int pair = 0; pair < 4; ++pair) {
            for (int vector = 0; vector < kVectors; ++vector) {
                Bytes first, second;
                groups.load_pair(pair, vector, first, second);
                for (int r = 0; r < kRows; ++r) dots[r][vector].add(first, rows.row(first_row + r) + at + 8 * pair, second);
            }
        }
    }
    alignas(64) float total[kPanel];
    for (int r = 0; r < kRows; ++r) {
        const int row = first_row + r;
        const Ints zero = splat(kSignedWeights ? 0 : 128 * rows.sums[row]);
        for (int vector = 0; vector < kVectors; ++vector) {
            const Floats scale = load<Floats>(matrix.channel_scales(panel) + vector * kLanes) * splat(rows.scales[row]);
            store(total + vector * kLanes, to_floats(dots[r][vector].sum() - zero) * scale);
        }
        float* to = result.out + rows.targets[row] * result.ld_out + panel * kPanel;
        const float* base = rows.is_rest(row) ? to : result.bias == nullptr ? nullptr : result.bias + panel * kPanel;
        for (int c = 0; c < num_columns; ++c) to[c] = total[c] + (base != nullptr ? base[c] : 0.0f);
    }
}

template <Format kFormat>
void multiply_channels(const PackedMatrix& matrix, PanelRange panels, const ByteRows& rows, const LinearResult& result) {
    for (int panel = panels.first; panel < panels.last; ++panel) {
        int row = 0;
        for (; row + 2 <= rows.num_rows; row += 2) channel_tile<kFormat, 2>(matrix, panel, rows, row, result);
        if (row < rows.num_rows) channel_tile<kFormat, 1>(matrix, panel, rows, row, result);
    }
}

inline void channel_panels(const PackedMatrix& matrix, PanelRange panels, const ByteRows& rows, const LinearResult& result,
                           uint8_t*) {
    const bool is_int8 = matrix.format == Format::INT8_CHANNEL;
    const auto multiply = is_int8 ? multiply_channels<Format::INT8_CHANNEL> : multiply_channels<Format::INT4_CHANNEL>;
    multiply(matrix, panels, rows, result);
}

inline GroupScale scale_of_row(const float* x, int num_inputs) {
    uint32_t largest = 0;
    for (int i = 0; i < num_inputs; ++i) largest = std::max(largest, float_to_bits(std::abs(x[i])));
    return scale_of_group(largest);
}

inline bool quantize_channel_row(const float* x, int num_inputs, int8_t* to, float* scale, int32_t* sum) {
    const GroupScale row_scale = scale_of_row(x, num_inputs);
    *scale = row_scale.scale;
    *sum = 0;
    float squares = 0.0f;
    for (int start = 0; start < num_inputs; start += kChunk, to += ByteRows::kTileBytes) {
        for (int i = 0; i < kChunk; ++i) {
            const float value = start + i < num_inputs && row_scale.inverse != 0.0f ? x[start + i] : 0.0f;
            to[i] = static_cast<int8_t>(std::nearbyint(value * row_scale.inverse));
            *sum += to[i];
            squares += value * value;
        }
    }
    return row_scale.inverse != 0.0f && wants_rest(row_scale, squares, num_inputs);
}

inline void quantize_channel_rest(const float* x, int num_inputs, int8_t* to, float* scale, int32_t* sum) {
    const GroupScale row_scale = scale_of_row(x, num_inputs);
    std::vector<float> rest(x, x + num_inputs);
    for (float& value : rest) value -= static_cast<float>(std::nearbyint(value * row_scale.inverse)) * row_scale.scale;
    quantize_channel_row(rest.data(), num_inputs, to, scale, sum);
}

}  // namespace pelton::PELTON_ISA
