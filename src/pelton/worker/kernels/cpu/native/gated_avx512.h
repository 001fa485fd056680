// act(gate) * up of sums of integers, as what quantizes it next can bear: rounded to bfloat16, powers of two within
// 1e-4.
#pragma once

#include "channel_avx512.h"
#include "tiles.h"

namespace pelton::avx512 {

// 16 outputs of gate (side 0) and of up (side 1).
struct GatedSums {
    __m512 scale[2];
    __m512 bias[2];

    GatedSums(const PackedMatrix* const (&sides)[2], const float* const (&from)[2], int panel, int half) {
        for (int side = 0; side < 2; ++side) {
            scale[side] = _mm512_loadu_ps(sides[side]->channel_scales(panel) + 16 * half);
            bias[side] =
                from[side] == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(from[side] + panel * kPanel + 16 * half);
        }
    }

    // As ChannelColumns::store.
    __m512 value(const ByteRows& rows, int row, int side, const int32_t* sums) const {
        const __m512i exact = _mm512_sub_epi32(_mm512_load_si512(sums), excess(rows, row));
        const __m512 factor = _mm512_mul_ps(scale[side], _mm512_set1_ps(rows.scales[row]));
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), factor, bias[side]);
    }
};

// 1 / (1 + 2^x) within 2e-4. Few instructions, most of them for the one port that tiles leave to floats.
inline __m512 rough_inverse(__m512 x) {
    constexpr int kSmallerSize = 2;  // of two values, with the first one's sign
    const __m512 magic = _mm512_set1_ps(0x1.8p23f);  // adding it leaves a whole number in the low bits
    x = _mm512_range_ps(x, _mm512_set1_ps(126.0f), kSmallerSize);
    const __m512 shifted = _mm512_add_ps(x, magic);
    const __m512 r = _mm512_sub_ps(x, _mm512_sub_ps(shifted, magic));
    __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(5.50088e-2f), _mm512_set1_ps(2.4221088e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9328293e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    const __m512i power = _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23));
    return _mm512_rcp14_ps(_mm512_add_ps(_mm512_castsi512_ps(power), _mm512_set1_ps(1.0f)));
}

inline __m512 rough_silu_mul(__m512 gate, __m512 up) {
    const __m512 inverse = rough_inverse(_mm512_mul_ps(gate, _mm512_set1_ps(-1.44269504f)));
    return _mm512_mul_ps(_mm512_mul_ps(gate, inverse), up);
}

// gelu of tanh(y) is x / (1 + exp(-2 y)).
inline __m512 rough_gelu_mul(__m512 gate, __m512 up) {
    constexpr float kScale = -2.0f * 0.7978845608f * 1.44269504f;
    const __m512 inner =
        _mm512_fmadd_ps(_mm512_mul_ps(gate, gate), _mm512_set1_ps(0.044715f * kScale), _mm512_set1_ps(kScale));
    return _mm512_mul_ps(_mm512_mul_ps(gate, rough_inverse(_mm512_mul_ps(inner, gate))), up);
}

// Up to kFewRows rows: the same operations on the same sums.
inline void gated_few(const GatedPanels& gated, PanelRange panels, const ByteRows& rows, const PairedRows& hidden) {
    constexpr int kPanelsAtOnce = 8;  // streams of memory should be long
    constexpr int kWidth = kPanelsAtOnce * kPanel;
    alignas(64) float values[2][kFewRows][kWidth];
    const auto act = [&](int row, int i) {
        const __m512 gate = _mm512_load_ps(values[0][row] + i), up = _mm512_load_ps(values[1][row] + i);
        return gated.gelu ? rough_gelu_mul(gate, up) : rough_silu_mul(gate, up);
    };
    for (int first = panels.first; first < panels.last; first += kPanelsAtOnce) {
        const PanelRange some = {first, std::min(first + kPanelsAtOnce, panels.last)};
        for (int side = 0; side < 2; ++side) {
            // The rows' numbers are those of the whole result.
            float* to = values[side][0] - first * kPanel - static_cast<int64_t>(rows.first) * kWidth;
            multiply_few(*gated.sides[side], some, rows, {gated.bias[side], to, kWidth});
        }
        for (int i = 0; i < (some.last - some.first) * kPanel; i += 16) {
            for (int row = 0; row < rows.num_rows; row += 2) {
                const __m512 even = act(row, i), odd = row + 1 < rows.num_rows ? act(row + 1, i) : even;
                _mm512_store_si512(hidden.at(row, first * kPanel + i),
                                   reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even)));
            }
        }
    }
}

// A row of bfloat16 of which `row` is the first value of a pair's.
struct PairedRow {
    const uint16_t* row;

    __m512 operator()(int start) const {
        const __m512i words =
            _mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(row + 2 * start)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    }
};

inline void quantize_paired_row(const uint16_t* from, const ByteRows& rows, int row) {
    quantize_channel(PairedRow{from}, rows, row);
}

}  // namespace pelton::avx512
