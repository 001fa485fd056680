// Dense float32 products in vectors of the compiler's own. Included by one source file per instruction set,
// which defines PELTON_ISA (a namespace) first.
#pragma once

#include <algorithm>
#include <cstring>

#include "packed_matrix.h"

namespace pelton::PELTON_ISA {

typedef float Lanes __attribute__((vector_size(64)));

constexpr int kSumInputs = 256;

// Rows of x [kRows, I] times a panel [I][32]. Inputs are added up in order, in sums of kSumInputs (which keeps
// rounding small), each output by itself: a row's result depends on nothing else (law 3).
template <int kRows>
inline void dense_rows(const float* panel, int num_inputs, const float* x, const float* bias, int num_columns,
                       float* out, int64_t ld_out) {
    Lanes total[kRows][2] = {};
    for (int start = 0; start < num_inputs; start += kSumInputs) {
        Lanes sum[kRows][2] = {};
        for (int i = start; i < std::min(start + kSumInputs, num_inputs); ++i) {
            Lanes weights[2];
            std::memcpy(weights, panel + static_cast<int64_t>(i) * kPanel, sizeof(weights));
            for (int row = 0; row < kRows; ++row) {
                const float value = x[static_cast<int64_t>(row) * num_inputs + i];
                sum[row][0] += weights[0] * value;
                sum[row][1] += weights[1] * value;
            }
        }
        for (int row = 0; row < kRows; ++row) {
            total[row][0] += sum[row][0];
            total[row][1] += sum[row][1];
        }
    }
    for (int row = 0; row < kRows; ++row) {
        float sums[kPanel];
        std::memcpy(sums, total[row], sizeof(sums));
        for (int c = 0; c < num_columns; ++c) out[row * ld_out + c] = sums[c] + (bias != nullptr ? bias[c] : 0.0f);
    }
}

inline void dense_panel(const float* panel, int num_inputs, const float* x, int num_rows, const float* bias,
                        int num_columns, float* out, int64_t ld_out) {
    int row = 0;
    for (; row + 4 <= num_rows; row += 4) {
        dense_rows<4>(panel, num_inputs, x + static_cast<int64_t>(row) * num_inputs, bias, num_columns,
                      out + row * ld_out, ld_out);
    }
    for (; row < num_rows; ++row) {
        dense_rows<1>(panel, num_inputs, x + static_cast<int64_t>(row) * num_inputs, bias, num_columns,
                      out + row * ld_out, ld_out);
    }
}

}  // namespace pelton::PELTON_ISA
