// Products of bfloat16 tiles: weights are unpacked to bfloat16 a group at a time, just ahead of the products.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "activation_avx512.h"
#include "linear_avx512.h"
#include "tile_registers.h"
#include "tiles.h"

namespace pelton::amx {

constexpr int kRowBytes = 64;
constexpr int kTileBytes = kTileHeight * kRowBytes;
constexpr int kUnpackRounds = 4;  // over which the next strip is unpacked

// Values are cut off, not rounded, to bfloat16: scaled up by the mean loss, that is as good on average
// (for mantissas spread evenly on a logarithmic scale) and costs half.
constexpr float kCutGain = 1.0f + 0.7213475f / 256.0f;

// value = scale * q + offset for 16 outputs, q read as a float with bits of `base` above it.
struct Scales {
    __m512 scale;
    __m512 offset[2];  // q at bit 8, at bit 16
};

// A q at bit 8 or 16 of a word turns into the float 2^15 + q or 2^7 + q by an `or`.
constexpr int kMagicAt8 = 0x47000000, kMagicAt16 = 0x43000000;

template <Format kFormat>
inline void load_scales(const avx512::GroupScales& from, int sub, int half, Scales& to) {
    constexpr FormatTraits traits = traits_of(kFormat);
    const __m512 gain = _mm512_set1_ps(kCutGain);
    to.scale = _mm512_mul_ps(from.scale[sub][half], gain);
    const auto offset = [&](float base) {
        const __m512 scaled = _mm512_set1_ps(-base - static_cast<float>(traits.zero_point));
        if constexpr (traits.has_min) {
            return _mm512_fnmadd_ps(from.min[0][half], gain, _mm512_mul_ps(to.scale, scaled));
        } else {
            return _mm512_mul_ps(to.scale, scaled);
        }
    };
    to.offset[0] = offset(0x1p15f);
    to.offset[1] = offset(0x1p7f);
}

inline __m512 float_at_8(__m512i bytes, const Scales& scales) {
    const __m512i q = _mm512_ternarylogic_epi32(bytes, _mm512_set1_epi32(0xff00), _mm512_set1_epi32(kMagicAt8), 0xea);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(q), scales.scale, scales.offset[0]);
}

// Only where q has less than 8 bits.
inline __m512 float_at_16(__m512i bytes, const Scales& scales) {
    const __m512i q =
        _mm512_ternarylogic_epi32(bytes, _mm512_set1_epi32(0xff0000), _mm512_set1_epi32(kMagicAt16), 0xea);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(q), scales.scale, scales.offset[1]);
}

// Pairs of bfloat16 from the upper halves.
inline __m512i cut_pairs(__m512 low, __m512 high) {
    return _mm512_ternarylogic_epi32(_mm512_srli_epi32(_mm512_castps_si512(low), 16), _mm512_castps_si512(high),
                                     _mm512_set1_epi32(static_cast<int>(0xffff0000)), 0xf8);
}

// Four inputs of 16 outputs, a byte each, not yet cut.
template <Format kFormat>
inline void decode_bytes(__m512i bytes, const Scales& scales, __m512 (&input)[4]) {
    const __m512i turned = _mm512_ror_epi32(bytes, 16);
    if constexpr (traits_of(kFormat).bits == 8) {
        input[0] = float_at_8(_mm512_rol_epi32(bytes, 8), scales);
        input[2] = float_at_8(_mm512_ror_epi32(bytes, 8), scales);
    } else {
        input[0] = float_at_16(turned, scales);
        input[2] = float_at_16(bytes, scales);
    }
    input[1] = float_at_8(bytes, scales);
    input[3] = float_at_8(turned, scales);
}

// The same to two rows of a tile: inputs (0, 3) and (1, 2).
template <Format kFormat>
inline void store_rows(__m512i bytes, const Scales& scales, uint8_t* to) {
    __m512 input[4];
    decode_bytes<kFormat>(bytes, scales, input);
    _mm512_store_si512(to, cut_pairs(input[0], input[3]));
    _mm512_store_si512(to + kRowBytes, cut_pairs(input[1], input[2]));
}

// A group of BF16, whose pairs of inputs are (0, 1) and (2, 3).
inline void reorder_group(const uint8_t* from, uint8_t* to) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    for (int half = 0; half < 2; ++half, from += kRowBytes, to += kTileBytes) {
        for (int row = 0; row < kTileHeight; row += 2) {
            const __m512i first = _mm512_loadu_si512(from + row * 2 * kRowBytes);
            const __m512i second = _mm512_loadu_si512(from + (row + 1) * 2 * kRowBytes);
            _mm512_store_si512(to + row * kRowBytes, _mm512_ternarylogic_epi32(upper, second, first, 0xca));
            _mm512_store_si512(to + (row + 1) * kRowBytes,
                               _mm512_or_si512(_mm512_srli_epi32(first, 16), _mm512_slli_epi32(second, 16)));
        }
    }
}

// A group of a panel to two tiles [2 halves][16 pairs of inputs][16 outputs][2].
template <Format kFormat>
inline void unpack_group(const avx512::PackedSource<kFormat>& source, uint8_t* to) {
    if constexpr (kFormat == Format::BF16) {
        reorder_group(source.group, to);
    } else {
        constexpr FormatTraits traits = traits_of(kFormat);
        const avx512::GroupScales all = source.scales();
        for (int half = 0; half < 2; ++half) {
            for (int sub = 0; sub < traits.subgroups; ++sub) {
                Scales scales;
                load_scales<kFormat>(all, sub, half, scales);
                constexpr int kPairs = 4 / traits.subgroups;
                for (int pair = sub * kPairs; pair < (sub + 1) * kPairs; ++pair) {
                    __m512i first, second;
                    source.load_pair(pair, half, first, second);
                    uint8_t* rows = to + half * kTileBytes + 4 * pair * kRowBytes;
                    store_rows<kFormat>(first, scales, rows);
                    store_rows<kFormat>(second, scales, rows + 2 * kRowBytes);
                }
            }
        }
    }
}

// Sums of up to 32 rows x 32 columns, in tile registers 0 to 3: two blocks of rows x two halves of a panel.
// Rows pass through 4 and 5, weights through 6 and 7.
template <bool kTwoBlocks>
inline void load_sums(const float* from, int64_t ld) {
    load_tile<0>(from, ld * 4);
    load_tile<1>(from + 16, ld * 4);
    if constexpr (kTwoBlocks) {
        load_tile<2>(from + kTileHeight * ld, ld * 4);
        load_tile<3>(from + kTileHeight * ld + 16, ld * 4);
    }
}

template <bool kTwoBlocks>
inline void store_sums(float* to, int64_t ld) {
    store_tile<0>(to, ld * 4);
    store_tile<1>(to + 16, ld * 4);
    if constexpr (kTwoBlocks) {
        store_tile<2>(to + kTileHeight * ld, ld * 4);
        store_tile<3>(to + kTileHeight * ld + 16, ld * 4);
    }
}

// sums += a group of two blocks of rows, one at `rows` and one `next_block` further on. kPassing: others follow.
template <bool kTwoBlocks, bool kPassing = false>
inline void add_group(const uint16_t* rows, int64_t next_block, const uint8_t* weights) {
    load_tile<6>(weights, kRowBytes);
    load_tile<7>(weights + kTileBytes, kRowBytes);
    kPassing ? load_passing_tile<4>(rows, kRowBytes) : load_tile<4>(rows, kRowBytes);
    multiply_tiles<0, 4, 6>();
    multiply_tiles<1, 4, 7>();
    if constexpr (kTwoBlocks) {
        kPassing ? load_passing_tile<5>(rows + next_block, kRowBytes) : load_tile<5>(rows + next_block, kRowBytes);
        multiply_tiles<2, 5, 6>();
        multiply_tiles<3, 5, 7>();
    }
}

inline void configure(int first_rows, int second_rows) {
    TileConfig config;
    for (int half = 0; half < 2; ++half) {
        config.set(half, first_rows, kRowBytes);
        config.set(2 + half, second_rows, kRowBytes);
        config.set(6 + half, kTileHeight, kRowBytes);
    }
    config.set(4, first_rows, kRowBytes);
    config.set(5, second_rows, kRowBytes);
    config.load();
}

// Where a panel's columns of the result go.
struct Columns {
    const float* bias;  // may be null
    float* out;
    int64_t ld_out;
    int count;

    Columns(const PackedMatrix& matrix, int panel, const LinearResult& result)
        : bias(result.bias == nullptr ? nullptr : result.bias + panel * kPanel),
          out(result.out + panel * kPanel),
          ld_out(result.ld_out),
          count(std::min(kPanel, matrix.num_outputs - panel * kPanel)) {}

    void load_bias(float (&row)[kPanel]) const {
        std::fill_n(row, kPanel, 0.0f);
        if (bias != nullptr) std::copy_n(bias, count, row);
    }
};

// Up to 32 rows: products follow on the heels of unpacking, sums stay in registers.
template <Format kFormat, bool kTwoBlocks>
void multiply_few(const PackedMatrix& matrix, int panel, const TiledRows& rows, const LinearResult& result,
                  uint8_t* ring) {
    // A tile that was just stored is slow to load: products trail by half the ring.
    constexpr int kBehind = kTileRing / 2;
    const int num_groups = matrix.num_groups();
    const int64_t next_block = rows.block(1) - rows.block(0);
    const Columns columns(matrix, panel, result);
    if (columns.bias != nullptr) {
        alignas(64) float row[kPanel];
        columns.load_bias(row);
        load_sums<kTwoBlocks>(row, 0);
    } else {
        zero_sums();
    }
    avx512::PackedSource<kFormat> source(matrix.panel(panel));
    const auto multiply = [&](int group) {
        add_group<kTwoBlocks>(rows.values + static_cast<int64_t>(group) * kTileValues, next_block,
                              ring + group % kTileRing * kTileGroupBytes);
    };
    for (int group = 0; group < num_groups; ++group) {
        if (group >= kBehind) multiply(group - kBehind);
        unpack_group<kFormat>(source, ring + group % kTileRing * kTileGroupBytes);
        source.next();
    }
    for (int group = std::max(0, num_groups - kBehind); group < num_groups; ++group) multiply(group);
    if (columns.count == kPanel) {
        store_sums<kTwoBlocks>(columns.out, columns.ld_out);
        return;
    }
    alignas(64) float copy[2 * kTileHeight][kPanel];
    store_sums<kTwoBlocks>(copy[0], kPanel);
    for (int row = 0; row < rows.num_rows; ++row) {
        std::copy_n(copy[row], columns.count, columns.out + row * columns.ld_out);
    }
}

// One row, without tiles, in their order: of a group's pairs first the sum of each side, then that of both.
// `x`: the row's values as floats, as they lie in its tiles.
template <Format kFormat>
void multiply_one(const PackedMatrix& matrix, int panel, const float* x, const LinearResult& result) {
    constexpr FormatTraits traits = traits_of(kFormat);
    constexpr int kPairs = 4 / traits.subgroups;
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    const auto cut = [upper](__m512 value) {
        return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(value), upper));
    };
    const Columns columns(matrix, panel, result);
    alignas(64) float row[kPanel];
    columns.load_bias(row);
    __m512 total[2] = {_mm512_load_ps(row), _mm512_load_ps(row + 16)};
    avx512::PackedSource<kFormat> source(matrix.panel(panel));
    for (int group = 0; group < matrix.num_groups(); ++group, source.next(), x += kGroup) {
        const avx512::GroupScales all = source.scales();
        __m512 even[2] = {}, odd[2] = {};
        for (int sub = 0; sub < traits.subgroups; ++sub) {
            Scales scales[2];
            for (int half = 0; half < 2; ++half) load_scales<kFormat>(all, sub, half, scales[half]);
            for (int pair = sub * kPairs; pair < (sub + 1) * kPairs; ++pair) {
                for (int half = 0; half < 2; ++half) {
                    __m512i bytes[2];
                    source.load_pair(pair, half, bytes[0], bytes[1]);
                    for (int four = 0; four < 2; ++four) {
                        const float* own = x + 8 * pair + 4 * four;
                        __m512 input[4];
                        decode_bytes<kFormat>(bytes[four], scales[half], input);
                        even[half] = _mm512_fmadd_ps(cut(input[0]), _mm512_set1_ps(own[0]), even[half]);
                        odd[half] = _mm512_fmadd_ps(cut(input[3]), _mm512_set1_ps(own[1]), odd[half]);
                        even[half] = _mm512_fmadd_ps(cut(input[1]), _mm512_set1_ps(own[2]), even[half]);
                        odd[half] = _mm512_fmadd_ps(cut(input[2]), _mm512_set1_ps(own[3]), odd[half]);
                    }
                }
            }
        }
        for (int half = 0; half < 2; ++half) total[half] = _mm512_add_ps(total[half], _mm512_add_ps(even[half], odd[half]));
    }
    _mm512_store_ps(row, total[0]);
    _mm512_store_ps(row + 16, total[1]);
    std::copy_n(row, columns.count, columns.out);
}

// The first row of a block of tiles as floats.
inline void widen_row(const TiledRows& rows, float* to) {
    for (int at = 0; at < rows.num_inputs; at += 32) {
        const auto* tile = reinterpret_cast<const __m256i*>(rows.values + at * kTileHeight);
        for (int half = 0; half < 2; ++half) {
            const __m512i words = _mm512_cvtepu16_epi32(_mm256_load_si256(tile + half));
            _mm512_store_si512(to + at + 16 * half, _mm512_slli_epi32(words, 16));
        }
    }
}

// Any number of rows. A strip of groups is unpacked once for all rows and stays in L1; sums wait in `sums`
// [rows, 32] between strips and in the result between calls.
template <Format kFormat>
void multiply_many(const PackedMatrix& matrix, int panel, GroupRange groups, const TiledRows& rows,
                   const LinearResult& result, uint8_t* scratch) {
    const Columns columns(matrix, panel, result);
    const int num_blocks = (rows.num_rows + 2 * kTileHeight - 1) / (2 * kTileHeight) * 2;
    const int64_t next_block = rows.block(1) - rows.block(0);
    auto* sums = reinterpret_cast<float*>(scratch + 2 * kTileStripBytes);
    alignas(64) float bias[kPanel];
    columns.load_bias(bias);
    avx512::PackedSource<kFormat> source(matrix.panel(panel), groups.first);
    // Strips of equal length.
    const int num_groups = groups.last - groups.first;
    const int num_strips = (num_groups + kTileStrip - 1) / kTileStrip;
    const int strip = (num_groups + num_strips - 1) / num_strips;
    const auto strip_at = [&](int group) {
        return scratch + (group - groups.first) / strip % 2 * kTileStripBytes +
               (group - groups.first) % strip * kTileGroupBytes;
    };
    const auto unpack = [&](int group) {
        unpack_group<kFormat>(source, strip_at(group));
        source.next();
    };
    // Whole pairs of blocks go straight to and from the result.
    const auto is_direct = [&](int block) {
        return columns.count == kPanel && (block + 2) * kTileHeight <= rows.num_rows;
    };
    const auto num_rows_of = [&](int block) { return std::min(2 * kTileHeight, rows.num_rows - block * kTileHeight); };
    for (int group = groups.first; group < std::min(groups.first + strip, groups.last); ++group) unpack(group);
    for (int group = groups.first; group < groups.last; group += strip) {
        const int end = std::min(group + strip, groups.last);
        int unpacked = end;
        const int unpack_end = std::min(end + strip, groups.last);
        for (int block = 0; block < num_blocks; block += 2) {
            float* own = sums + static_cast<int64_t>(block) * kTileHeight * kPanel;
            float* out = columns.out + static_cast<int64_t>(block) * kTileHeight * columns.ld_out;
            if (group == 0) {
                load_sums<true>(bias, 0);
            } else if (group > groups.first) {
                load_sums<true>(own, kPanel);
            } else if (is_direct(block)) {
                load_sums<true>(out, columns.ld_out);
            } else {
                for (int row = 0; row < num_rows_of(block); ++row) {
                    std::copy_n(out + row * columns.ld_out, columns.count, own + row * kPanel);
                }
                load_sums<true>(own, kPanel);
            }
            const uint16_t* values = rows.block(block) + static_cast<int64_t>(group) * kTileValues;
            // The vector units unpack the next strip while the tiles multiply this one, in the last rounds.
            const int rounds_left = (num_blocks - block) / 2, every = std::min(rounds_left, kUnpackRounds);
            const bool unpacks = rounds_left <= kUnpackRounds;
            for (int i = group; i < end; ++i, values += kTileValues) {
                add_group<true, true>(values, next_block, strip_at(i));
                if (unpacks && (i - group) % every == 0 && unpacked < unpack_end) unpack(unpacked++);
            }
            if (block + 2 >= num_blocks) {
                while (unpacked < unpack_end) unpack(unpacked++);
            }
            if (end == groups.last && is_direct(block)) {
                store_sums<true>(out, columns.ld_out);
                continue;
            }
            store_sums<true>(own, kPanel);
            if (end < groups.last) continue;
            for (int row = 0; row < num_rows_of(block); ++row) {
                std::copy_n(own + row * kPanel, columns.count, out + row * columns.ld_out);
            }
        }
    }
}

template <Format kFormat>
void multiply_panels(const PackedMatrix& matrix, PanelRange panels, GroupRange groups, const TiledRows& rows,
                     const LinearResult& result, uint8_t* scratch) {
    if constexpr (!traits_of(kFormat).is_dense()) {
        if (rows.num_rows == 1) {
            auto* x = reinterpret_cast<float*>(scratch);
            widen_row(rows, x);
            for (int panel = panels.first; panel < panels.last; ++panel) multiply_one<kFormat>(matrix, panel, x, result);
            return;
        }
    }
    if (rows.is_few()) {
        configure(std::min(rows.num_rows, kTileHeight), std::max(rows.num_rows - kTileHeight, 1));
    } else {
        configure(kTileHeight, kTileHeight);
    }
    for (int panel = panels.first; panel < panels.last; ++panel) {
        if (!rows.is_few()) {
            multiply_many<kFormat>(matrix, panel, groups, rows, result, scratch);
        } else if (rows.num_rows > kTileHeight) {
            multiply_few<kFormat, true>(matrix, panel, rows, result, scratch);
        } else {
            multiply_few<kFormat, false>(matrix, panel, rows, result, scratch);
        }
    }
    release_tiles();
}

inline void linear_panels(const PackedMatrix& matrix, PanelRange panels, GroupRange groups, const TiledRows& rows,
                          const LinearResult& result, uint8_t* scratch) {
    switch (matrix.format) {
        case Format::Q4_0: return multiply_panels<Format::Q4_0>(matrix, panels, groups, rows, result, scratch);
        case Format::Q4_1: return multiply_panels<Format::Q4_1>(matrix, panels, groups, rows, result, scratch);
        case Format::Q5_0: return multiply_panels<Format::Q5_0>(matrix, panels, groups, rows, result, scratch);
        case Format::Q5_1: return multiply_panels<Format::Q5_1>(matrix, panels, groups, rows, result, scratch);
        case Format::Q8_0: return multiply_panels<Format::Q8_0>(matrix, panels, groups, rows, result, scratch);
        case Format::Q4_K: return multiply_panels<Format::Q4_K>(matrix, panels, groups, rows, result, scratch);
        case Format::Q5_K: return multiply_panels<Format::Q5_K>(matrix, panels, groups, rows, result, scratch);
        case Format::Q6_K: return multiply_panels<Format::Q6_K>(matrix, panels, groups, rows, result, scratch);
        case Format::INT4: return multiply_panels<Format::INT4>(matrix, panels, groups, rows, result, scratch);
        case Format::INT8: return multiply_panels<Format::INT8>(matrix, panels, groups, rows, result, scratch);
        case Format::BF16: return multiply_panels<Format::BF16>(matrix, panels, groups, rows, result, scratch);
        default: return;  // dense: dense_panel's
    }
}

// 32 inputs in the order of `tile_input`.
inline __m512i tile_order() {
    alignas(64) uint16_t order[32];
    for (int place = 0; place < 32; ++place) order[place] = static_cast<uint16_t>(tile_input(place));
    return _mm512_load_si512(order);
}

inline void store_tile_row(uint16_t* to, __m512 first, __m512 second, __m512i order) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh(second, first);
    _mm512_store_si512(to, _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(pairs)));
}

inline void pack_rows(const float* x, int num_rows, int num_inputs, uint16_t* to) {
    const __m512i order = tile_order();
    for (int row = 0; row < num_rows; ++row, x += num_inputs) {
        uint16_t* at = to + row * 32;
        for (int i = 0; i < num_inputs; i += 32, at += kTileValues) {
            store_tile_row(at, _mm512_loadu_ps(x + i), _mm512_loadu_ps(x + i + 16), order);
        }
    }
}

inline void gated_rows(bool gelu, const float* gate, const float* up, int64_t ld, int num_rows, uint16_t* to) {
    const __m512i order = tile_order();
    const auto store = [&](auto act) {
        for (int row = 0; row < num_rows; ++row, gate += ld, up += ld, to += 32) {
            store_tile_row(to, act(_mm512_loadu_ps(gate), _mm512_loadu_ps(up)),
                           act(_mm512_loadu_ps(gate + 16), _mm512_loadu_ps(up + 16)), order);
        }
    };
    if (gelu) {
        store([](__m512 x, __m512 y) { return avx512::gelu_tanh_mul(x, y); });
    } else {
        store([](__m512 x, __m512 y) { return avx512::silu_mul(x, y); });
    }
}

}  // namespace pelton::amx
