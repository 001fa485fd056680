// Float32 products, 32 outputs at a time: of dense weights as they lie, and of quantized ones decoded first.
//
// A row's sum is one multiply-add per input, inputs in order, and one addition per 256 inputs (which keeps the
// rounding errors of long rows small), however many rows there are (law 3).
#pragma once

#include <algorithm>

#include "kernel_table.h"
#include "packed_groups.h"

namespace pelton::PELTON_ISA {

#if defined(__AVX512F__)
constexpr int kDenseRows = 12;  // of 32 outputs
constexpr int kDenseColumns = 32;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kDenseRows = 5;  // of 16
constexpr int kDenseColumns = 16;
#else
constexpr int kDenseRows = 2;
constexpr int kDenseColumns = 16;
#endif
constexpr int kInputsAhead = 64;
constexpr int kBlockInputs = 256;

// Weights of inputs 2 * pair and 2 * pair + 1 and of kLanes outputs from `column` on.
struct DenseF32 {
    static constexpr int kInputBytes = 4 * kPanel;
    const uint8_t* panel;
    void load_pair(int pair, int column, Floats& first, Floats& second) const {
        const uint8_t* at = panel + static_cast<size_t>(pair) * 2 * kInputBytes + 4 * column;
        first = load<Floats>(at);
        second = load<Floats>(at + kInputBytes);
    }
};

struct DenseF16 {
    static constexpr int kInputBytes = 2 * kPanel;
    const uint8_t* panel;
    void load_pair(int pair, int column, Floats& first, Floats& second) const {
        const uint8_t* at = panel + static_cast<size_t>(pair) * 2 * kInputBytes;
        first = load_factors<ScaleType::F16>(at, column);
        second = load_factors<ScaleType::F16>(at + kInputBytes, column);
    }
};

struct DenseBF16 {
    static constexpr int kInputBytes = 2 * kPanel;
    const uint8_t* panel;
    void load_pair(int pair, int column, Floats& first, Floats& second) const {
        const Words words = load<Words>(panel + static_cast<size_t>(pair) * 2 * kInputBytes + 4 * column);
        first = bits_as<Floats>(words << 16);
        second = bits_as<Floats>(words & 0xffff0000u);
    }
};

template <class Source, int kRows, int kColumns>
inline void dense_columns(const Source& source, const float* x, int num_inputs, int first_column,
                          float (*sums)[kPanel]) {
    constexpr int kVectors = kColumns / kLanes;
    const auto add_input = [&](Floats (&total)[kRows][kVectors], const Floats (&weights)[kVectors], int input) {
        for (int r = 0; r < kRows; ++r) {
            const Floats factor = splat(x[static_cast<size_t>(r) * num_inputs + input]);
            for (int v = 0; v < kVectors; ++v) total[r][v] = multiply_add(factor, weights[v], total[r][v]);
        }
    };
    for (int start = 0; start < num_inputs; start += kBlockInputs) {
        const int end = std::min(start + kBlockInputs, num_inputs);
        Floats total[kRows][kVectors] = {};
        for (int input = start; input < end; input += 2) {
            Floats first[kVectors], second[kVectors];
            for (int v = 0; v < kVectors; ++v) {
                source.load_pair(input / 2, first_column + v * kLanes, first[v], second[v]);
            }
            const uint8_t* ahead = source.panel + (static_cast<size_t>(input) + kInputsAhead) * Source::kInputBytes;
            for (int line = 0; line < 2 * Source::kInputBytes; line += 64) __builtin_prefetch(ahead + line);
            add_input(total, first, input);
            if (input + 1 < end) add_input(total, second, input + 1);
        }
        for (int r = 0; r < kRows; ++r) {
            for (int v = 0; v < kVectors; ++v) {
                float* to = sums[r] + first_column + v * kLanes;
                store(to, load<Floats>(to) + total[r][v]);
            }
        }
    }
}

template <class Source, int kRows>
void dense_tile(const Source& source, const FloatRows& rows, int first_row, const float* bias, int num_columns,
                float* out, int64_t ld_out) {
    // One or two rows wait for memory: the whole panel in one pass.
    constexpr int kColumns = kRows <= 2 ? kPanel : kDenseColumns;
    const float* x = rows.values + static_cast<size_t>(first_row) * rows.num_inputs;
    alignas(64) float sums[kRows][kPanel] = {};
    for (int column = 0; column < kPanel; column += kColumns) {
        dense_columns<Source, kRows, kColumns>(source, x, rows.num_inputs, column, sums);
    }
    for (int r = 0; r < kRows; ++r) {
        float* to = out + (first_row + r) * ld_out;
        for (int c = 0; c < num_columns; ++c) to[c] = sums[r][c] + (bias != nullptr ? bias[c] : 0.0f);
    }
}

template <class Source, int kRows>
void dense_rows(const Source& source, int num_rows, const FloatRows& rows, int first_row, const float* bias,
                int num_columns, float* out, int64_t ld_out) {
    if constexpr (kRows > 1) {
        if (num_rows < kRows) {
            return dense_rows<Source, kRows - 1>(source, num_rows, rows, first_row, bias, num_columns, out, ld_out);
        }
    }
    dense_tile<Source, kRows>(source, rows, first_row, bias, num_columns, out, ld_out);
}

template <class Source>
void multiply_dense(const Source& source, const FloatRows& rows, const float* bias, int num_columns, float* out,
                    int64_t ld_out) {
    const int num_tiles = (rows.num_rows + kDenseRows - 1) / kDenseRows;
    for (int tile = 0; tile < num_tiles; ++tile) {
        const int first = static_cast<int>(static_cast<int64_t>(rows.num_rows) * tile / num_tiles);
        const int last = static_cast<int>(static_cast<int64_t>(rows.num_rows) * (tile + 1) / num_tiles);
        dense_rows<Source, kDenseRows>(source, last - first, rows, first, bias, num_columns, out, ld_out);
    }
}

// A panel as float32 [inputs][32], each value as weights/dequantize.py has it.
template <Format kFormat>
DenseF32 decode_panel(const PackedMatrix& matrix, int panel, uint8_t* scratch) {
    constexpr FormatTraits traits = traits_of(kFormat);
    PackedGroups<kFormat> source(matrix.panel(panel));
    auto* floats = reinterpret_cast<float*>(scratch);
    for (int group = 0; group < matrix.num_groups(); ++group, source.next(), floats += kGroup * kPanel) {
        for (int column = 0; column < kPanel; column += kLanes) {
            const int half = column / kHalf, vector = column % kHalf / kLanes;
            Floats minimum = {};
            if constexpr (traits.has_min) minimum = source.minimum(half, vector);
            for (int k4 = 0; k4 < 8; k4 += 2) {
                Bytes codes[2];
                source.load_pair(k4 / 2, half, vector, codes[0], codes[1]);
                const Floats scale = source.scale(k4 * traits.subgroups / 8, half, vector);
                for (int i = 0; i < 8; ++i) {
                    const Words words = bits_as<Words>(codes[i / 4]) >> (8 * (i % 4)) & 255;
                    const Floats code = to_floats(bits_as<Ints>(words) - splat(traits.zero_point));
                    store(floats + (4 * k4 + i) * kPanel + column, code * scale - minimum);
                }
            }
        }
    }
    return {scratch};
}

inline void dense_panel(const PackedMatrix& matrix, int panel, const FloatRows& rows, const float* bias, float* out,
                        int64_t ld_out, uint8_t* scratch) {
    const int first_column = panel * kPanel;
    const int num_columns = std::min(kPanel, matrix.num_outputs - first_column);
    if (bias != nullptr) bias += first_column;
    out += first_column;
    const auto multiply = [&](const auto& source) { multiply_dense(source, rows, bias, num_columns, out, ld_out); };
    switch (matrix.format) {
        case Format::Q4_0: return multiply(decode_panel<Format::Q4_0>(matrix, panel, scratch));
        case Format::Q4_1: return multiply(decode_panel<Format::Q4_1>(matrix, panel, scratch));
        case Format::Q5_0: return multiply(decode_panel<Format::Q5_0>(matrix, panel, scratch));
        case Format::Q5_1: return multiply(decode_panel<Format::Q5_1>(matrix, panel, scratch));
        case Format::Q8_0: return multiply(decode_panel<Format::Q8_0>(matrix, panel, scratch));
        case Format::Q4_K: return multiply(decode_panel<Format::Q4_K>(matrix, panel, scratch));
        case Format::Q5_K: return multiply(decode_panel<Format::Q5_K>(matrix, panel, scratch));
        case Format::Q6_K: return multiply(decode_panel<Format::Q6_K>(matrix, panel, scratch));
        case Format::INT4: return multiply(decode_panel<Format::INT4>(matrix, panel, scratch));
        case Format::INT8: return multiply(decode_panel<Format::INT8>(matrix, panel, scratch));
        case Format::INT8_CHANNEL:
        case Format::INT4_CHANNEL: return;  // their activations always have 8 bits
        case Format::BF16: return multiply(DenseBF16{matrix.panel(panel)});
        case Format::F16: return multiply(DenseF16{matrix.panel(panel)});
        case Format::F32: return multiply(DenseF32{matrix.panel(panel)});
    }
}

}  // namespace pelton::PELTON_ISA
