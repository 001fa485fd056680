// Integer products with AVX-512 VNNI: unsigned weights times signed activations, 32 outputs at a time.
//
// Every path adds up a row in the same order: exact integers within a (sub)group, then one fused
// multiply-add per (sub)group, groups in order. So the number of rows does not change a bit (law 3).

#pragma once

#include <immintrin.h>

#include <algorithm>

#include "dot_avx512.h"
#include "kernel_table.h"
#include "prefetch_avx512.h"
#include "quantized_group.h"
#include "unrolled.h"

namespace pelton::avx512 {

constexpr int kTileRows = 6;

constexpr int kBitOfBytes[8] = {0x01010101, 0x02020202, 0x04040404, 0x08080808,
                                0x10101010, 0x20202020, 0x40404040, static_cast<int>(0x80808080)};

struct GroupScales {
    __m512 scale[2][2];  // [subgroup][half]
    __m512 min[2][2];
};

template <ScaleType kType>
inline __m512 load_scales(const uint8_t* p, int index) {
    if constexpr (kType == ScaleType::F16) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 2 * index)));
    } else if constexpr (kType == ScaleType::F32) {
        return _mm512_loadu_ps(reinterpret_cast<const float*>(p) + index);
    } else {
        const __m128i multiples = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + index));
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(multiples));
    }
}

// Groups as they lie in the packed matrix.
template <Format kFormat>
struct PackedSource {
    static constexpr FormatTraits kTraits = traits_of(kFormat);
    const uint8_t* group;
    const uint8_t* units;
    int left_in_block;

    explicit PackedSource(const uint8_t* panel, int first_group = 0)
        : group(panel + kTraits.group_offset(first_group)),
          units(panel + kTraits.block_offset(first_group / kBlockGroups)),
          left_in_block(kBlockGroups - first_group % kBlockGroups) {}
    void next() {
        for (int line = kTraits.is_dense() ? 0 : kTraits.low_bytes(); line < kTraits.group_bytes(); line += 64) prefetch(line);
        group += kTraits.group_bytes();
        if (kTraits.has_units() && --left_in_block == 0) {
            for (int line = 0; line < kTraits.unit_bytes(); line += 64) prefetch(line);
            units = group;
            group += kTraits.unit_bytes();
            left_in_block = kBlockGroups;
        }
    }

    // The line at `line` of what is read later. Between loads, some at a time: a burst would take all places for lines
    // under way.
    void prefetch(int line) const { prefetch_stream(group + line); }

    void load_pair(int pair, int half, __m512i& first, __m512i& second) const {
        if constexpr (kTraits.bits == 8) {
            for (int line : {0, 64}) prefetch((4 * pair + 2 * half) * 64 + line);
            first = _mm512_loadu_si512(group + (4 * pair + half) * 64);
            second = _mm512_loadu_si512(group + (4 * pair + 2 + half) * 64);
        } else {
            prefetch((2 * pair + half) * 64);
            const __m512i low = _mm512_set1_epi8(15);
            const __m512i nibbles = _mm512_loadu_si512(group + (2 * pair + half) * 64);
            first = add_high_bits(_mm512_and_si512(nibbles, low), 2 * pair, half);
            second = add_high_bits(_mm512_and_si512(_mm512_srli_epi16(nibbles, 4), low), 2 * pair + 1, half);
        }
    }

    GroupScales scales() const {
        GroupScales result;
        const uint8_t* p = group + kTraits.low_bytes() + kTraits.high_bytes();
        for (int sub = 0; sub < kTraits.subgroups; ++sub) {
            for (int half = 0; half < 2; ++half) {
                const int index = sub * kPanel + half * 16;
                result.scale[sub][half] = in_units(load_scales<kTraits.scale_type>(p, index), 16 * half);
                if constexpr (kTraits.has_min) {
                    const __m512 multiples = load_scales<kTraits.scale_type>(p + kTraits.scale_bytes(), index);
                    result.min[sub][half] = in_units(multiples, kPanel + 16 * half);
                }
            }
        }
        return result;
    }

private:
    __m512i add_high_bits(__m512i codes, int k4, int half) const {
        if constexpr (kTraits.bits > 4) {
            const __m512i planes = _mm512_loadu_si512(group + kTraits.high_offset(k4, half));
            for (int bit = 0; bit < kTraits.num_high_bits(); ++bit) {
                const __m512i chosen = _mm512_set1_epi32(kBitOfBytes[kTraits.high_position(k4) + bit]);
                const __m512i value = _mm512_set1_epi8(static_cast<char>(16 << bit));
                codes = _mm512_mask_add_epi8(codes, _mm512_test_epi8_mask(planes, chosen), codes, value);
            }
        }
        return codes;
    }
    __m512 in_units(__m512 multiples, int first_unit) const {
        if constexpr (!kTraits.has_units()) return multiples;
        return _mm512_mul_ps(multiples, load_scales<ScaleType::F16>(units, first_unit));
    }
};

// Groups unpacked to bytes and floats by `unpack`.
template <Format kFormat>
struct UnpackedSource {
    static constexpr FormatTraits kTraits = traits_of(kFormat);
    static constexpr int kScaleFloats = kTraits.subgroups * kPanel * (kTraits.has_min ? 2 : 1);
    const uint8_t* values;
    const float* floats;

    UnpackedSource(const uint8_t* scratch, int num_groups)
        : values(scratch), floats(reinterpret_cast<const float*>(scratch + 1024 * static_cast<size_t>(num_groups))) {}
    void next() {
        values += 1024;
        floats += kScaleFloats;
    }
    void load_pair(int pair, int half, __m512i& first, __m512i& second) const {
        first = _mm512_load_si512(values + (4 * pair + half) * 64);
        second = _mm512_load_si512(values + (4 * pair + 2 + half) * 64);
    }
    GroupScales scales() const {
        GroupScales result;
        for (int sub = 0; sub < kTraits.subgroups; ++sub) {
            for (int half = 0; half < 2; ++half) {
                const int index = sub * kPanel + half * 16;
                result.scale[sub][half] = _mm512_load_ps(floats + index);
                if constexpr (kTraits.has_min) {
                    result.min[sub][half] = _mm512_load_ps(floats + kTraits.subgroups * kPanel + index);
                }
            }
        }
        return result;
    }
};

template <Format kFormat>
void unpack(const uint8_t* panel, int num_groups, uint8_t* scratch) {
    constexpr FormatTraits traits = traits_of(kFormat);
    PackedSource<kFormat> source(panel);
    auto* values = scratch;
    auto* floats = reinterpret_cast<float*>(scratch + 1024 * static_cast<size_t>(num_groups));
    for (int group = 0; group < num_groups; ++group, source.next(), values += 1024) {
        for (int pair = 0; pair < 4; ++pair) {
            for (int half = 0; half < 2; ++half) {
                __m512i first, second;
                source.load_pair(pair, half, first, second);
                _mm512_store_si512(values + (4 * pair + half) * 64, first);
                _mm512_store_si512(values + (4 * pair + 2 + half) * 64, second);
            }
        }
        const GroupScales scales = source.scales();
        for (int sub = 0; sub < traits.subgroups; ++sub) {
            for (int half = 0; half < 2; ++half) {
                _mm512_store_ps(floats + sub * kPanel + half * 16, scales.scale[sub][half]);
                if constexpr (traits.has_min) {
                    _mm512_store_ps(floats + (traits.subgroups + sub) * kPanel + half * 16, scales.min[sub][half]);
                }
            }
        }
        floats += UnpackedSource<kFormat>::kScaleFloats;
    }
}

template <Format kFormat, class Source, int kRows>
inline void multiply_tile(Source source, const QuantizedRows& rows, int first_row, const float* bias, int num_columns,
                          float* out, int64_t ld_out) {
    constexpr FormatTraits traits = traits_of(kFormat);
    constexpr int pairs_per_sub = 4 / traits.subgroups;
    const int num_groups = rows.num_inputs / kGroup;
    const int8_t* values = rows.values + static_cast<size_t>(first_row) * rows.num_inputs;
    const float* scales = rows.scales + static_cast<size_t>(first_row) * num_groups;
    const int32_t* sums = rows.sums + static_cast<size_t>(first_row) * num_groups * 2;
    __m512 total[kRows][2];
    unrolled<kRows>([&](auto r) __attribute__((always_inline)) { total[r][0] = total[r][1] = _mm512_setzero_ps(); });

    for (int group = 0; group < num_groups; ++group, source.next()) {
        const GroupScales weight = source.scales();
        for (int sub = 0; sub < traits.subgroups; ++sub) {
            __m512i dot[kRows][2];
            unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
                const int32_t* sum = sums + (static_cast<size_t>(r) * num_groups + group) * 2;
                const int own = traits.subgroups == 2 ? sum[sub] : sum[0] + sum[1];
                dot[r][0] = dot[r][1] = _mm512_set1_epi32(-traits.zero_point * own);
            });
            for (int pair = sub * pairs_per_sub; pair < (sub + 1) * pairs_per_sub; ++pair) {
                __m512i first[2], second[2];
                source.load_pair(pair, 0, first[0], second[0]);
                source.load_pair(pair, 1, first[1], second[1]);
                unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
                    const int8_t* x = values + static_cast<size_t>(r) * rows.num_inputs + group * kGroup + 8 * pair;
                    add_dots(dot[r], first, x);
                    add_dots(dot[r], second, x + 4);
                });
            }
            unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
                const __m512 scale = _mm512_set1_ps(scales[static_cast<size_t>(r) * num_groups + group]);
                for (int half = 0; half < 2; ++half) {
                    total[r][half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r][half]),
                                                     _mm512_mul_ps(weight.scale[sub][half], scale), total[r][half]);
                    if constexpr (traits.has_min) {
                        const int32_t* sum = sums + (static_cast<size_t>(r) * num_groups + group) * 2;
                        const __m512 part = _mm512_mul_ps(scale, _mm512_set1_ps(static_cast<float>(sum[0] + sum[1])));
                        total[r][half] = _mm512_fnmadd_ps(weight.min[sub][half], part, total[r][half]);
                    }
                }
            });
        }
    }
    for (int half = 0; half < 2; ++half) {
        const int left = std::clamp(num_columns - 16 * half, 0, 16);
        const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
        const __m512 offset = bias != nullptr ? _mm512_maskz_loadu_ps(mask, bias + 16 * half) : _mm512_setzero_ps();
        for (int r = 0; r < kRows; ++r) {
            _mm512_mask_storeu_ps(out + r * ld_out + 16 * half, mask, _mm512_add_ps(total[r][half], offset));
        }
    }
}

template <Format kFormat, class Source>
void multiply_rows(Source source, int num_rows, const QuantizedRows& rows, int first_row, const float* bias,
                   int num_columns, float* out, int64_t ld_out) {
    switch (num_rows) {
        case 1: return multiply_tile<kFormat, Source, 1>(source, rows, first_row, bias, num_columns, out, ld_out);
        case 2: return multiply_tile<kFormat, Source, 2>(source, rows, first_row, bias, num_columns, out, ld_out);
        case 3: return multiply_tile<kFormat, Source, 3>(source, rows, first_row, bias, num_columns, out, ld_out);
        case 4: return multiply_tile<kFormat, Source, 4>(source, rows, first_row, bias, num_columns, out, ld_out);
        case 5: return multiply_tile<kFormat, Source, 5>(source, rows, first_row, bias, num_columns, out, ld_out);
        default: return multiply_tile<kFormat, Source, 6>(source, rows, first_row, bias, num_columns, out, ld_out);
    }
}

template <Format kFormat>
void multiply_panel(const PackedMatrix& matrix, int panel, const QuantizedRows& rows, const float* bias, float* out,
                    int64_t ld_out, uint8_t* scratch) {
    const int first_column = panel * kPanel;
    const int num_columns = std::min(kPanel, matrix.num_outputs - first_column);
    if (bias != nullptr) bias += first_column;
    out += first_column;
    if (rows.num_rows <= kTileRows) {
        multiply_rows<kFormat>(PackedSource<kFormat>(matrix.panel(panel)), rows.num_rows, rows, 0, bias, num_columns,
                               out, ld_out);
        return;
    }
    unpack<kFormat>(matrix.panel(panel), matrix.num_groups(), scratch);
    const UnpackedSource<kFormat> source(scratch, matrix.num_groups());
    // Tiles of nearly equal height: 8 rows are 4 + 4, not 6 + 2.
    const int num_tiles = (rows.num_rows + kTileRows - 1) / kTileRows;
    for (int tile = 0; tile < num_tiles; ++tile) {
        const int first = static_cast<int>(static_cast<int64_t>(rows.num_rows) * tile / num_tiles);
        const int last = static_cast<int>(static_cast<int64_t>(rows.num_rows) * (tile + 1) / num_tiles);
        multiply_rows<kFormat>(source, last - first, rows, first, bias, num_columns, out + first * ld_out, ld_out);
    }
}

inline void linear_panel(const PackedMatrix& matrix, int panel, const QuantizedRows& rows, const float* bias, float* out,
                  int64_t ld_out, uint8_t* scratch) {
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

inline void quantize_row(const float* x, int num_inputs, int8_t* values, float* scales, int32_t* sums) {
    for (int group = 0; group < num_inputs / kGroup; ++group, x += kGroup, values += kGroup) {
        const __m512 first = _mm512_loadu_ps(x), second = _mm512_loadu_ps(x + 16);
        const __m512i sizes = _mm512_max_epu32(_mm512_castps_si512(_mm512_abs_ps(first)),
                                               _mm512_castps_si512(_mm512_abs_ps(second)));
        const GroupScale group_scale = scale_of_group(_mm512_reduce_max_epu32(sizes));
        if (group_scale.inverse == 0.0f) {
            set_empty_group(group_scale, group, values, scales, sums);
            continue;
        }
        const float inverse = group_scale.inverse;
        const __m512i q0 = _mm512_cvtps_epi32(_mm512_mul_ps(first, _mm512_set1_ps(inverse)));
        const __m512i q1 = _mm512_cvtps_epi32(_mm512_mul_ps(second, _mm512_set1_ps(inverse)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(values), _mm512_cvtsepi32_epi8(q0));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(values + 16), _mm512_cvtsepi32_epi8(q1));
        scales[group] = group_scale.scale;
        sums[2 * group] = _mm512_reduce_add_epi32(q0);
        sums[2 * group + 1] = _mm512_reduce_add_epi32(q1);
    }
}

}  // namespace pelton::avx512
