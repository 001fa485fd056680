// Products with the two thin matrices of a LoRA adapter, in vectors. One accumulator per sum, in order of the
// inputs or ranks, whatever the number of rows and sums that go side by side.
#pragma once

#include "lora_matrix.h"
#include "vector.h"

namespace pelton::PELTON_ISA {

inline Floats load_lora(const float* from) { return load<Floats>(from); }
inline Floats load_lora(const uint16_t* from) { return load_bfloat16(from); }

// As many sums as stay in registers.
constexpr int kLoraSums = kLanes == 16 ? 16 : 8;

template <int kRanks, int kRows, typename Weight>
inline void lora_shrink_tile(const Weight* weights, int num_inputs, const float* const* x, int rank,
                             float* const* out) {
    const int64_t stride = lora_stride(num_inputs);
    const Weight* from = weights + rank * stride;
    Floats sums[kRanks][kRows] = {};
    const auto add = [&](int i, const Floats (&values)[kRows]) {
        for (int j = 0; j < kRanks; ++j) {
            const Floats weight = load_lora(from + j * stride + i);
            for (int row = 0; row < kRows; ++row) sums[j][row] = multiply_add(weight, values[row], sums[j][row]);
        }
    };
    int i = 0;
    Floats values[kRows];
    for (; i + kLanes <= num_inputs; i += kLanes) {
        for (int row = 0; row < kRows; ++row) values[row] = load<Floats>(x[row] + i);
        add(i, values);
    }
    if (i < num_inputs) {
        for (int row = 0; row < kRows; ++row) values[row] = load_some(x[row] + i, num_inputs - i);
        add(i, values);
    }
    for (int j = 0; j < kRanks; ++j) {
        for (int row = 0; row < kRows; ++row) out[row][rank + j] = reduce_add(sums[j][row]);
    }
}

template <int kRows, typename Weight>
inline void lora_shrink_rows(const Weight* weights, int num_inputs, LoraRange ranks, const float* const* x,
                             float* const* out) {
    constexpr int kRanks = kRows == 1 ? 8 : kLoraSums / 4;
    int rank = ranks.first;
    for (; rank + kRanks <= ranks.last; rank += kRanks) {
        lora_shrink_tile<kRanks, kRows>(weights, num_inputs, x, rank, out);
    }
    for (; rank < ranks.last; ++rank) lora_shrink_tile<1, kRows>(weights, num_inputs, x, rank, out);
}

template <int kVectors, int kRows, typename Weight>
inline void lora_expand_tile(const Weight* panel, const LoraPart& part, const float* const* shrunk, int column,
                             float* const* out) {
    const Weight* from = panel + column % kLoraPanel;
    Floats sums[kVectors][kRows] = {};
    for (int rank = 0; rank < part.num_ranks; ++rank) {
        Floats weights[kVectors];
        for (int i = 0; i < kVectors; ++i) weights[i] = load_lora(from + rank * kLoraPanel + i * kLanes);
        for (int row = 0; row < kRows; ++row) {
            const Floats value = splat(shrunk[row][rank]);
            for (int i = 0; i < kVectors; ++i) sums[i][row] = multiply_add(weights[i], value, sums[i][row]);
        }
    }
    for (int i = 0; i < kVectors; ++i) {
        const int left = part.num_outputs - column - i * kLanes;
        if (left <= 0) return;
        for (int row = 0; row < kRows; ++row) {
            float* to = out[row] + column + i * kLanes;
            store_some(to, multiply_add(splat(part.scale), sums[i][row], load_some(to, left)), left);
        }
    }
}

template <int kRows, typename Weight>
inline void lora_expand_rows(const Weight* weights, const LoraPart& part, LoraRange panels,
                             const float* const* shrunk, float* const* out) {
    constexpr int kVectors = kLoraSums / 4;
    for (int panel = panels.first; panel < panels.last; ++panel) {
        const Weight* from = weights + static_cast<int64_t>(panel) * part.num_ranks * kLoraPanel;
        const int first = panel * kLoraPanel;
        for (int column = first; column < std::min(first + kLoraPanel, part.num_outputs); column += kVectors * kLanes) {
            lora_expand_tile<kVectors, kRows>(from, part, shrunk, column, out);
        }
    }
}

// Calls run<rows>(weights) for the number of rows and the type of the matrix.
template <typename Run>
inline void with_lora_types(const LoraMatrix& matrix, int num_rows, const Run& run) {
    const auto typed = [&](const auto* weights) {
        switch (num_rows) {
            case 1: return run.template operator()<1>(weights);
            case 2: return run.template operator()<2>(weights);
            case 3: return run.template operator()<3>(weights);
            default: return run.template operator()<kLoraRows>(weights);
        }
    };
    if (matrix.bf16) {
        typed(static_cast<const uint16_t*>(matrix.data));
    } else {
        typed(static_cast<const float*>(matrix.data));
    }
}

inline void lora_shrink(const LoraMatrix& matrix, int num_inputs, LoraRange ranks, const float* const* x, int num_rows,
                        float* const* out) {
    with_lora_types(matrix, num_rows, [&]<int kRows>(const auto* weights) {
        lora_shrink_rows<kRows>(weights, num_inputs, ranks, x, out);
    });
}

inline void lora_expand(const LoraPart& part, LoraRange panels, const float* const* shrunk, int num_rows,
                        float* const* out) {
    with_lora_types(part.expand, num_rows, [&]<int kRows>(const auto* weights) {
        lora_expand_rows<kRows>(weights, part, panels, shrunk, out);
    });
}

}  // namespace pelton::PELTON_ISA
