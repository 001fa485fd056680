// A row of weights rounded to blocks by channel. What weights/channel_quantization.py does in numpy, to the same bits:
// float32 operations in the same order, none of them fused.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "packed_matrix.h"
#include "vector.h"

namespace pelton::PELTON_ISA {

typedef uint8_t Codes __attribute__((vector_size(kLanes)));

struct ChannelScale {
    float scale;    // NaN for a row that is not finite
    float inverse;  // 0 where there is none: then all codes are 0

    // kLanes values over the scale, from -127 to 127.
    Floats codes(const float* values) const {
        return inverse > 0.0f ? load<Floats>(values) * inverse : Floats{};
    }
};

inline ChannelScale channel_scale(const float* values, int num_inputs) {
    // As integers: NaN is more than infinity, which is more than any number.
    Ints greatest = {};
    for (int i = 0; i < num_inputs; i += kLanes) {
        const Ints size = load<Ints>(values + i) & 0x7fffffff;
        greatest = size > greatest ? size : greatest;
    }
    int32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits = std::max(bits, greatest[i]);
    if (bits >= 0x7f800000) return {bits_to_float(0x7fc00000), 0.0f};
    const float scale = bits_to_float(bits) / 127.0f, inverse = 1.0f / scale;
    return {scale, std::isfinite(inverse) ? inverse : 0.0f};
}

// Lines of 16 points, base + step * q, of kLanes groups of 32 codes from 1 to 255 [32][kLanes].
struct GroupLines {
    const Floats (&codes)[kGroup];
    Floats step, base;

    explicit GroupLines(const Floats (&group_codes)[kGroup]) : codes(group_codes) {
        Floats low = codes[0], high = codes[0];
        for (int k = 1; k < kGroup; ++k) {
            low = codes[k] < low ? codes[k] : low;
            high = codes[k] > high ? codes[k] : high;
        }
        const Floats width = (high - low) / 15.0f, nearest = round(width);
        const Floats widest = nearest < width ? nearest + 1.0f : nearest;
        Floats least = splat(std::numeric_limits<float>::infinity());
        step = base = Floats{};
        for (int narrower = 0; narrower < 3; ++narrower) {
            const Floats own_step = max(widest - static_cast<float>(narrower), splat(1.0f));
            const Floats reach = 15.0f * own_step;
            const Floats own_base = clamp(round((low + high - reach) / 2.0f), splat(0.0f), 255.0f - reach);
            const Floats error = error_of(own_step, own_base);
            const Ints is_nearer = error < least;
            least = select(is_nearer, error, least);
            step = select(is_nearer, own_step, step);
            base = select(is_nearer, own_base, base);
        }
    }

    Floats q(int k) const { return nearest_point(k, step, base); }

private:
    static Floats clamp(Floats value, Floats low, Floats high) {
        value = value > low ? value : low;
        return value < high ? value : high;
    }

    Floats nearest_point(int k, Floats own_step, Floats own_base) const {
        return clamp(round((codes[k] - own_base) / own_step), splat(0.0f), splat(15.0f));
    }

    // In the order in which numpy adds up 32 neighbours.
    Floats error_of(Floats own_step, Floats own_base) const {
        Floats eight[8];
        for (int k = 0; k < kGroup; ++k) {
            const Floats off = nearest_point(k, own_step, own_base) * own_step + own_base - codes[k];
            eight[k % 8] = k < 8 ? off * off : eight[k % 8] + off * off;
        }
        return ((eight[0] + eight[1]) + (eight[2] + eight[3])) + ((eight[4] + eight[5]) + (eight[6] + eight[7]));
    }
};

// Of kLanes groups, `num_groups` of which are there.
inline void round_to_int4(const float* values, int num_groups, ChannelScale row, uint8_t* blocks) {
    constexpr FormatTraits traits = traits_of(Format::INT4_CHANNEL);
    alignas(64) float across[kGroup][kLanes] = {};
    for (int group = 0; group < num_groups; ++group) {
        for (int k = 0; k < kGroup; ++k) across[k][group] = values[group * kGroup + k];
    }
    Floats codes[kGroup];
    for (int k = 0; k < kGroup; ++k) codes[k] = row.codes(across[k]) + 128.0f;
    const GroupLines lines(codes);
    uint8_t pairs[kGroup / 2][kLanes];
    for (int k = 0; k < kGroup / 2; ++k) {
        const Ints pair = __builtin_convertvector(lines.q(k), Ints) | __builtin_convertvector(lines.q(k + 16), Ints) << 4;
        store(pairs[k], __builtin_convertvector(pair, Codes));
    }
    for (int group = 0; group < num_groups; ++group, blocks += traits.file_block_bytes) {
        std::memcpy(blocks, &row.scale, 4);
        blocks[4] = static_cast<uint8_t>(lines.step[group]);
        blocks[5] = static_cast<uint8_t>(lines.base[group]);
        for (int k = 0; k < kGroup / 2; ++k) blocks[6 + k] = pairs[k][group];
    }
}

inline void round_to_int8(const float* values, int num_groups, ChannelScale row, uint8_t* blocks) {
    constexpr FormatTraits traits = traits_of(Format::INT8_CHANNEL);
    for (int group = 0; group < num_groups; ++group, values += kGroup, blocks += traits.file_block_bytes) {
        std::memcpy(blocks, &row.scale, 4);
        for (int k = 0; k < kGroup; k += kLanes) {
            const Ints code = __builtin_convertvector(round(row.codes(values + k)), Ints);
            store(blocks + 4 + k, __builtin_convertvector(code, Codes));
        }
    }
}

inline void round_channel_row(const float* values, int num_inputs, int bits, uint8_t* blocks) {
    const ChannelScale row = channel_scale(values, num_inputs);
    const int num_groups = num_inputs / kGroup;
    if (bits == 8) return round_to_int8(values, num_groups, row, blocks);
    for (int first = 0; first < num_groups; first += kLanes) {
        round_to_int4(values + first * kGroup, std::min(kLanes, num_groups - first), row,
                      blocks + first * traits_of(Format::INT4_CHANNEL).file_block_bytes);
    }
}

}  // namespace pelton::PELTON_ISA
