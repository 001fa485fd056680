// What chunks of positions add to 16 columns, and how chunks are put together.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "attention.h"
#include "attention_schedule.h"
#include "exp2_avx512.h"
#include "transpose_avx512.h"

namespace pelton::amx {

constexpr int kColumns = kPartColumns;
constexpr float kHidden = -1e30f;  // the score of what a column does not see: finite, so that it subtracts

// Sums of 16 columns over one chunk or more: results [D][16], then maxima (powers of 2) and sums [16].
struct PartialSums {
    float* data;
    int dim;

    float* maxima() const { return data + static_cast<int64_t>(dim) * kColumns; }
    float* sums() const { return maxima() + kColumns; }

    void clear() const {
        std::fill_n(data, static_cast<int64_t>(dim) * kColumns, 0.0f);
        std::fill_n(maxima(), kColumns, kHidden);
        std::fill_n(sums(), kColumns, 0.0f);
    }

    // Adds columns [lane, ...) of `part` under `mask` to the first ones here.
    void add(const PartialSums& part, int lane, __mmask16 mask) const {
        const __m512 before = _mm512_load_ps(maxima());
        const __m512 largest = _mm512_mask_loadu_ps(_mm512_set1_ps(kHidden), mask, part.maxima() + lane);
        const __m512 maximum = _mm512_max_ps(before, largest);
        const __m512 keep = avx512::exp2_negative(_mm512_sub_ps(before, maximum));
        const __m512 take = avx512::exp2_negative(_mm512_sub_ps(largest, maximum));
        _mm512_store_ps(maxima(), maximum);
        const auto merge = [&](float* to, const float* from) {
            const __m512 added = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from + lane), take);
            _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_load_ps(to), keep, added));
        };
        merge(sums(), part.sums());
        for (int d = 0; d < dim; ++d) merge(data + d * kColumns, part.data + d * kColumns);
    }

    // Results over sums, where the columns want them.
    void store(const AttentionColumn* columns, int count) const {
        const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_load_ps(sums()));
        for (int d = 0; d < dim; d += 16) {
            __m512i rows[16];
            for (int i = 0; i < 16; ++i) {
                rows[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(data + (d + i) * kColumns), inverse));
            }
            avx512::transpose(rows);
            for (int i = 0; i < count; ++i) {
                if (columns[i].out != nullptr) _mm512_storeu_si512(columns[i].out + d, rows[i]);
            }
        }
    }

    static constexpr int64_t num_floats(int dim) { return static_cast<int64_t>(dim + 2) * kColumns; }
};

}  // namespace pelton::amx
