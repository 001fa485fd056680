// Products of weights by channel with AVX-512 VNNI: one scale per output, one per row of activations.
//
// A row's sum of integers is exact, and becomes a float in one fused multiply-add (law 3).
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <bit>

#include "dot_avx512.h"
#include "kernel_table.h"
#include "quantized_group.h"
#include "unrolled.h"

namespace pelton::avx512 {

constexpr int kChannelRows = 6;  // whose sums leave registers for much else
constexpr int kFewRows = 12;
// Into the second level: the first has too few places for lines under way.
constexpr int kChannelBytesAhead = 9216;
constexpr int kStreamBytesAhead = 16384;  // without tiles

// By how much a sum of unsigned codes is too much: 128 times the row's sum.
inline __m512i excess(const ByteRows& rows, int row) {
    return _mm512_slli_epi32(_mm512_set1_epi32(rows.sums[row]), 7);
}

// A panel's codes of 8 bits, a group at a time: as they lie, or made of 4 bits.
template <Format kFormat>
struct ChannelGroups {
    static constexpr int kGroupBytes = traits_of(kFormat).group_bytes();
    static constexpr bool kHasSteps = traits_of(kFormat).bits == 4;
    const uint8_t* group;
    __m512i steps[2];  // of each half; 16 bits, two to an output
    __m512i bases[2];  // 8 bits, four to an output

    explicit ChannelGroups(const uint8_t* panel) : group(panel) {}
    void next() {
        group += kGroupBytes;
        prefetch(kStreamBytesAhead);
    }
    void prefetch(int ahead = kChannelBytesAhead) const {
        for (int line = 0; line < kGroupBytes; line += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(group + ahead + line), _MM_HINT_T1);
        }
    }

    // Before the pairs of a group.
    void start() {
        if constexpr (!kHasSteps) return;
        const __m512i first_byte = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
        for (int half = 0; half < 2; ++half) {
            const auto* at = reinterpret_cast<const __m128i*>(group + traits_of(kFormat).low_bytes() + 16 * half);
            const __m512i step = _mm512_cvtepu8_epi32(_mm_loadu_si128(at));
            steps[half] = _mm512_or_si512(step, _mm512_slli_epi32(step, 16));
            bases[half] = _mm512_shuffle_epi8(_mm512_cvtepu8_epi32(_mm_loadu_si128(at + 2)), first_byte);
        }
    }

    // Codes of k4 = 2 * pair and 2 * pair + 1.
    void load_pair(int pair, int half, __m512i& first, __m512i& second) const {
        if constexpr (kHasSteps) {
            const __m512i low = _mm512_set1_epi8(15), nibbles = _mm512_loadu_si512(group + (2 * pair + half) * 64);
            first = code(_mm512_and_si512(nibbles, low), half);
            second = code(_mm512_and_si512(_mm512_srli_epi16(nibbles, 4), low), half);
        } else {
            first = _mm512_loadu_si512(group + (4 * pair + half) * 64);
            second = _mm512_loadu_si512(group + (4 * pair + 2 + half) * 64);
        }
    }

    // Codes of one k4.
    __m512i load_four(int k4, int half) const {
        if constexpr (!kHasSteps) return _mm512_loadu_si512(group + (2 * k4 + half) * 64);
        const __m512i nibbles = _mm512_loadu_si512(group + (k4 / 2 * 2 + half) * 64);
        const __m512i own = _mm512_srl_epi16(nibbles, _mm_cvtsi32_si128(k4 % 2 * 4));
        return code(_mm512_and_si512(own, _mm512_set1_epi8(15)), half);
    }

private:
    // step * q has 8 bits, so that of two in a product of 16 neither reaches the other.
    __m512i code(__m512i q, int half) const {
        return _mm512_add_epi8(_mm512_mullo_epi16(q, steps[half]), bases[half]);
    }
};

// What the outliers of a row add to the sums of a panel's halves.
template <Format kFormat>
inline void add_outliers(const uint8_t* panel, const ByteRows& rows, int row, __m512i (&sums)[2]) {
    static_assert(Outlier::kHighStep == 255);
    __m512i high[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    const Outlier* outliers = rows.outliers_of(row);
    for (int i = 0; i < rows.num_outliers[row]; ++i) {
        const auto input = static_cast<uint32_t>(outliers[i].input);
        ChannelGroups<kFormat> groups(panel + input / kGroup * ChannelGroups<kFormat>::kGroupBytes);
        groups.start();
        const __m512i codes[2] = {groups.load_four(input % kGroup / 4, 0), groups.load_four(input % kGroup / 4, 1)};
        add_dots(high, codes, outliers[i].codes);
    }
    for (int half = 0; half < 2; ++half) {
        const __m512i times_256 = _mm512_slli_epi32(high[half], 8);
        sums[half] = _mm512_add_epi32(sums[half], _mm512_sub_epi32(times_256, high[half]));
    }
}

// What turns the sums of a panel's columns into a result.
struct ChannelColumns {
    __m512 scale[2];
    __m512 bias[2];
    __mmask16 mask[2];
    float* out;
    int64_t ld_out;
    const uint8_t* codes;
    bool is_int8;

    ChannelColumns(const PackedMatrix& matrix, int panel, const LinearResult& result)
        : out(result.out + panel * kPanel),
          ld_out(result.ld_out),
          codes(matrix.panel(panel)),
          is_int8(matrix.format == Format::INT8_CHANNEL) {
        for (int half = 0; half < 2; ++half) {
            const int first = panel * kPanel + 16 * half;
            const int left = std::clamp(matrix.num_outputs - first, 0, 16);
            mask[half] = static_cast<__mmask16>((1u << left) - 1);
            scale[half] = _mm512_loadu_ps(matrix.channel_scales(panel) + 16 * half);
            bias[half] =
                result.bias != nullptr ? _mm512_maskz_loadu_ps(mask[half], result.bias + first) : _mm512_setzero_ps();
        }
    }

    // The sums of both halves.
    void store(const ByteRows& rows, int row, __m512i first, __m512i second) const {
        __m512i sums[2] = {first, second};
        if (rows.num_outliers[row] != 0) {
            const auto add = is_int8 ? add_outliers<Format::INT8_CHANNEL> : add_outliers<Format::INT4_CHANNEL>;
            add(codes, rows, row, sums);
        }
        float* to = out + (rows.first + row) * ld_out;
        for (int half = 0; half < 2; ++half) {
            const __m512i exact = _mm512_sub_epi32(sums[half], excess(rows, row));
            const __m512 factor = _mm512_mul_ps(scale[half], _mm512_set1_ps(rows.scales[row]));
            const __m512 result = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), factor, bias[half]);
            _mm512_mask_storeu_ps(to + 16 * half, mask[half], result);
        }
    }
};

template <Format kFormat, int kRows>
void channel_tile(const PackedMatrix& matrix, int panel, const ByteRows& rows, const ChannelColumns& columns) {
    // Sums of more rows leave registers for the codes of one half only.
    constexpr bool kBothHalves = kRows <= kChannelRows;
    ChannelGroups<kFormat> groups(matrix.panel(panel));
    const int8_t* x[kRows];
    __m512i sum[kRows][2];
    unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
        x[r] = rows.row(r);
        sum[r][0] = sum[r][1] = _mm512_setzero_si512();
    });
    for (int group = 0; group < 2 * rows.num_chunks(); ++group, groups.next()) {
        groups.start();
        const int at = group / 2 * ByteRows::kTileBytes + group % 2 * kGroup;
        for (int pair = 0; pair < 4; ++pair) {
            if constexpr (kBothHalves) {
                __m512i codes[2][2];
                for (int half = 0; half < 2; ++half) groups.load_pair(pair, half, codes[0][half], codes[1][half]);
                unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
                    add_dots(sum[r], codes[0], x[r] + at + 8 * pair);
                    add_dots(sum[r], codes[1], x[r] + at + 8 * pair + 4);
                });
            } else {
                unrolled<2>([&](auto half) __attribute__((always_inline)) {
                    __m512i first, second;
                    groups.load_pair(pair, half, first, second);
                    unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
                        add_dot(sum[r][half], first, x[r] + at + 8 * pair);
                        add_dot(sum[r][half], second, x[r] + at + 8 * pair + 4);
                    });
                });
            }
        }
    }
    for (int r = 0; r < kRows; ++r) columns.store(rows, r, sum[r][0], sum[r][1]);
}

template <Format kFormat, int kRows = kFewRows>
void multiply_few(const PackedMatrix& matrix, int panel, const ByteRows& rows, const ChannelColumns& columns) {
    if constexpr (kRows > 1) {
        if (rows.num_rows < kRows) return multiply_few<kFormat, kRows - 1>(matrix, panel, rows, columns);
    }
    channel_tile<kFormat, kRows>(matrix, panel, rows, columns);
}

// Up to kFewRows rows: codes go from memory straight into products.
inline void multiply_few(const PackedMatrix& matrix, PanelRange panels, const ByteRows& rows, const LinearResult& result) {
    const bool is_int8 = matrix.format == Format::INT8_CHANNEL;
    const auto multiply = is_int8 ? multiply_few<Format::INT8_CHANNEL> : multiply_few<Format::INT4_CHANNEL>;
    for (int panel = panels.first; panel < panels.last; ++panel) multiply(matrix, panel, rows, {matrix, panel, result});
}

// Row `row` from floats that `load(start)` gives, 16 at a time: those past the end are not asked for.
template <typename Load>
void quantize_channel(const Load& load, const ByteRows& rows, int row) {
    const int num_inputs = rows.num_inputs;
    __m512i sizes = _mm512_setzero_si512();
    __m512 squares = _mm512_setzero_ps();
    for (int i = 0; i < num_inputs; i += 16) {
        const __m512 value = load(i);
        sizes = _mm512_max_epu32(sizes, _mm512_castps_si512(_mm512_abs_ps(value)));
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    const uint32_t largest = _mm512_reduce_max_epu32(sizes);
    const bool may_have_outliers = rows.outliers != nullptr;
    const auto squares_below = [&](float limit) {
        __m512 sum = _mm512_setzero_ps();
        for (int i = 0; i < num_inputs; i += 16) {
            const __m512 value = load(i);
            const __mmask16 is_below = _mm512_cmp_ps_mask(_mm512_abs_ps(value), _mm512_set1_ps(limit), _CMP_LE_OQ);
            sum = _mm512_mask3_fmadd_ps(value, value, sum, is_below);
        }
        return _mm512_reduce_add_ps(sum);
    };
    const GroupScale scale = may_have_outliers
                                 ? scale_of_row(largest, _mm512_reduce_add_ps(squares), num_inputs, squares_below)
                                 : scale_of_group(largest);
    const bool is_empty = scale.inverse == 0.0f;
    const __m512 inverse = _mm512_set1_ps(scale.inverse);
    const __m512i most = _mm512_set1_epi32(127);
    __m512i total = _mm512_setzero_si512();
    int8_t* to = rows.row(row);
    rows.num_outliers[row] = 0;
    for (int start = 0; start < num_inputs; start += kChunk, to += ByteRows::kTileBytes) {
        for (int i = 0; i < kChunk; i += 16) {
            __m512i codes = _mm512_setzero_si512();
            if (!is_empty && start + i < num_inputs) codes = _mm512_cvtps_epi32(_mm512_mul_ps(load(start + i), inverse));
            total = _mm512_add_epi32(total, codes);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtsepi32_epi8(codes));
            uint32_t longer = may_have_outliers ? _mm512_cmpgt_epi32_mask(_mm512_abs_epi32(codes), most) : 0;
            for (; longer != 0; longer &= longer - 1) {
                alignas(64) int32_t words[16];
                _mm512_store_si512(words, codes);
                const int lane = std::countr_zero(longer);
                to[i + lane] = shorten(words[lane], start + i + lane, rows, row);
            }
        }
    }
    rows.scales[row] = scale.scale;
    rows.sums[row] = _mm512_reduce_add_epi32(total);
}

inline void quantize_channel_row(const float* x, const ByteRows& rows, int row) {
    quantize_channel([x](int start) { return _mm512_loadu_ps(x + start); }, rows, row);
}

}  // namespace pelton::avx512
