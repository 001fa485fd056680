// Products of weights by channel with AVX-512 VNNI: one scale per output, one per row of activations.
//
// A row's sum of integers is exact, and becomes a float in one fused multiply-add (law 3).
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "kernel_table.h"
#include "quantized_group.h"

namespace pelton::avx512 {

constexpr int kChannelRows = 6;
constexpr int kChannelBytesAhead = 4096;

// What turns the sums of a panel's columns into a result.
struct ChannelColumns {
    __m512 scale[2];
    __m512 bias[2];
    __mmask16 mask[2];
    float* out;
    int64_t ld_out;

    ChannelColumns(const PackedMatrix& matrix, int panel, const LinearResult& result)
        : out(result.out + panel * kPanel), ld_out(result.ld_out) {
        for (int half = 0; half < 2; ++half) {
            const int first = panel * kPanel + 16 * half;
            const int left = std::clamp(matrix.num_outputs - first, 0, 16);
            mask[half] = static_cast<__mmask16>((1u << left) - 1);
            scale[half] = _mm512_loadu_ps(matrix.channel_scales(panel) + 16 * half);
            bias[half] =
                result.bias != nullptr ? _mm512_maskz_loadu_ps(mask[half], result.bias + first) : _mm512_setzero_ps();
        }
    }

    // `sum`: of unsigned codes, so 128 times the row's sum too much.
    void store(const ByteRows& rows, int row, int half, __m512i sum) const {
        const __m512i exact = _mm512_sub_epi32(sum, _mm512_set1_epi32(128 * rows.sums[row]));
        const __m512 factor = _mm512_mul_ps(scale[half], _mm512_set1_ps(rows.scales[row]));
        float* to = out + rows.targets[row] * ld_out + 16 * half;
        const __m512 base = rows.is_rest(row) ? _mm512_maskz_loadu_ps(mask[half], to) : bias[half];
        _mm512_mask_storeu_ps(to, mask[half], _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), factor, base));
    }
};

// Codes of 8 bits: as they lie, or made of 4 bits.
template <Format kFormat>
struct ChannelGroups {
    static constexpr bool kMakes = traits_of(kFormat).bits == 4;
    static constexpr int kGroupBytes = traits_of(kFormat).group_bytes();
    const uint8_t* group;
    __m512i steps[2], bases[2];

    // Before the pairs of each group.
    void start() {
        if constexpr (!kMakes) return;
        const __m512i twice = _mm512_set1_epi32(static_cast<int>(0x80018000)), unused = twice;
        (void)unused;
    }
};

template <Format kFormat, int kRows>
void channel_tile(const PackedMatrix& matrix, int panel, const ByteRows& rows, int first_row, const ChannelColumns& columns) {
    const uint8_t* weights = matrix.panel(panel);
    const int8_t* x[kRows];
    for (int r = 0; r < kRows; ++r) x[r] = rows.row(first_row + r);
    __m512i sum[kRows][2];
    for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
    for (int chunk = 0; chunk < rows.num_chunks(); ++chunk) {
        for (int k4 = 0; k4 < kChunk / 4; ++k4, weights += 128) {
            _mm_prefetch(reinterpret_cast<const char*>(weights + kChannelBytesAhead), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(weights + kChannelBytesAhead + 64), _MM_HINT_T0);
            const __m512i first = _mm512_loadu_si512(weights), second = _mm512_loadu_si512(weights + 64);
            for (int r = 0; r < kRows; ++r) {
                int32_t four;
                std::memcpy(&four, x[r] + 4 * k4, 4);
                const __m512i own = _mm512_set1_epi32(four);
                sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], first, own);
                sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], second, own);
            }
        }
        for (int r = 0; r < kRows; ++r) x[r] += ByteRows::kTileBytes;
    }
    for (int r = 0; r < kRows; ++r) {
        for (int half = 0; half < 2; ++half) columns.store(rows, first_row + r, half, sum[r][half]);
    }
}

inline void channel_panels(const PackedMatrix& matrix, PanelRange panels, const ByteRows& rows, const LinearResult& result,
                           uint8_t*) {
    const int num_tiles = (rows.num_rows + kChannelRows - 1) / kChannelRows;
    for (int panel = panels.first; panel < panels.last; ++panel) {
        const ChannelColumns columns(matrix, panel, result);
        for (int tile = 0; tile < num_tiles; ++tile) {
            const int first = static_cast<int>(static_cast<int64_t>(rows.num_rows) * tile / num_tiles);
            const int last = static_cast<int>(static_cast<int64_t>(rows.num_rows) * (tile + 1) / num_tiles);
            switch (last - first) {
                case 1: channel_tile<1>(matrix, panel, rows, first, columns); break;
                case 2: channel_tile<2>(matrix, panel, rows, first, columns); break;
                case 3: channel_tile<3>(matrix, panel, rows, first, columns); break;
                case 4: channel_tile<4>(matrix, panel, rows, first, columns); break;
                case 5: channel_tile<5>(matrix, panel, rows, first, columns); break;
                default: channel_tile<6>(matrix, panel, rows, first, columns); break;
            }
        }
    }
}

// A row's codes, 16 at a time, from floats that `load(start)` gives: those past the end are not asked for.
template <typename Load>
bool quantize_channel(const Load& load, int num_inputs, int8_t* to, float* scale, int32_t* sum) {
    __m512i sizes = _mm512_setzero_si512();
    __m512 squares = _mm512_setzero_ps();
    for (int i = 0; i < num_inputs; i += 16) {
        const __m512 value = load(i);
        sizes = _mm512_max_epu32(sizes, _mm512_castps_si512(_mm512_abs_ps(value)));
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    const GroupScale row_scale = scale_of_group(_mm512_reduce_max_epu32(sizes));
    const bool is_empty = row_scale.inverse == 0.0f;
    const __m512 inverse = _mm512_set1_ps(row_scale.inverse);
    __m512i total = _mm512_setzero_si512();
    for (int start = 0; start < num_inputs; start += kChunk, to += ByteRows::kTileBytes) {
        for (int i = 0; i < kChunk; i += 16) {
            __m512i codes = _mm512_setzero_si512();
            if (!is_empty && start + i < num_inputs) codes = _mm512_cvtps_epi32(_mm512_mul_ps(load(start + i), inverse));
            total = _mm512_add_epi32(total, codes);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtsepi32_epi8(codes));
        }
    }
    *scale = row_scale.scale;
    *sum = _mm512_reduce_add_epi32(total);
    return !is_empty && wants_rest(row_scale, _mm512_reduce_add_ps(squares), num_inputs);
}

// The same of what that leaves of the values.
template <typename Load>
void quantize_rest(const Load& load, int num_inputs, int8_t* to, float* scale, int32_t* sum) {
    __m512i sizes = _mm512_setzero_si512();
    for (int i = 0; i < num_inputs; i += 16) {
        sizes = _mm512_max_epu32(sizes, _mm512_castps_si512(_mm512_abs_ps(load(i))));
    }
    const GroupScale row_scale = scale_of_group(_mm512_reduce_max_epu32(sizes));
    const __m512 step = _mm512_set1_ps(row_scale.scale), inverse = _mm512_set1_ps(row_scale.inverse);
    const auto load_rest = [&](int start) {
        const __m512 value = load(start);
        const __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
        return _mm512_fnmadd_ps(_mm512_cvtepi32_ps(codes), step, value);
    };
    quantize_channel(load_rest, num_inputs, to, scale, sum);
}

inline bool quantize_channel_row(const float* x, int num_inputs, int8_t* to, float* scale, int32_t* sum) {
    return quantize_channel([x](int start) { return _mm512_loadu_ps(x + start); }, num_inputs, to, scale, sum);
}

inline void quantize_channel_rest(const float* x, int num_inputs, int8_t* to, float* scale, int32_t* sum) {
    quantize_rest([x](int start) { return _mm512_loadu_ps(x + start); }, num_inputs, to, scale, sum);
}

}  // namespace pelton::avx512
