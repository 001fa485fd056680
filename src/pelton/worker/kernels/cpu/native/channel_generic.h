// Products of INT8_CHANNEL weights for the instruction sets below AVX-512: one scale per output, one per row.
//
// A row's sum of integers is exact, and becomes a float in one multiply-add (law 3).
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "dot_products.h"
#include "kernel_table.h"
#include "quantized_group.h"

namespace pelton::PELTON_ISA {

template <int kRows>
void channel_tile(const PackedMatrix& matrix, int panel, const ByteRows& rows, int first_row, const LinearResult& result) {
    constexpr int kVectors = kPanel / kLanes, kBytes = 4 * kLanes;
    const int num_columns = std::min(kPanel, matrix.num_outputs - panel * kPanel);
    Dot<8> dots[kRows][kVectors];
    const uint8_t* weights = matrix.panel(panel);
    for (int chunk = 0; chunk < rows.num_chunks(); ++chunk) {
        for (int k4 = 0; k4 < kChunk / 4; k4 += 2, weights += 4 * 64) {
            for (int vector = 0; vector < kVectors; ++vector) {
                const Bytes first = load<Bytes>(weights + vector * kBytes);
                const Bytes second = load<Bytes>(weights + 2 * 64 + vector * kBytes);
                for (int r = 0; r < kRows; ++r) {
                    dots[r][vector].add(first, rows.row(first_row + r) + chunk * ByteRows::kTileBytes + 4 * k4, second);
                }
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

inline void channel_panels(const PackedMatrix& matrix, PanelRange panels, const ByteRows& rows, const LinearResult& result,
                           uint8_t*) {
    for (int panel = panels.first; panel < panels.last; ++panel) {
        int row = 0;
        for (; row + 2 <= rows.num_rows; row += 2) channel_tile<2>(matrix, panel, rows, row, result);
        if (row < rows.num_rows) channel_tile<1>(matrix, panel, rows, row, result);
    }
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
