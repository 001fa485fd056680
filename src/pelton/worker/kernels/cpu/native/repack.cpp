#include <algorithm>
#include <cstring>
#include <new>

#include "float16.h"
#include "packed_matrix.h"
#include "thread_pool.h"

namespace pelton {

namespace {

// A group of 32 inputs of all outputs of a panel, decoded as far as is exact.
struct DecodedGroup {
    alignas(64) uint8_t q[kPanel][kGroup];
    uint8_t* scales;  // of the packed group; minima follow
    uint8_t* units;   // likewise, of its block
    uint8_t* steps;   // likewise, of INT4_CHANNEL; bases follow
};

uint16_t load_u16(const uint8_t* p) {
    uint16_t value;
    std::memcpy(&value, p, 2);
    return value;
}

template <typename T>
void store(uint8_t* values, int index, T value) {
    std::memcpy(values + index * sizeof(T), &value, sizeof(T));
}

// Six-bit scale and minimum `index` of a 4- or 5-bit K block (ggml's packing of 12 bytes).
void k_scale_min(const uint8_t* p, int index, int& scale, int& min) {
    if (index < 4) {
        scale = p[index] & 63;
        min = p[index + 4] & 63;
    } else {
        scale = (p[index + 4] & 15) | ((p[index - 4] >> 6) << 4);
        min = (p[index + 4] >> 4) | ((p[index] >> 6) << 4);
    }
}

// Bit k of `bits` to bit 4 of q[k].
void add_fifth_bits(uint8_t* q, uint32_t bits) {
    for (int byte = 0; byte < 4; ++byte) {
        uint64_t spread = ((bits >> (8 * byte)) & 255) * 0x0101010101010101u & 0x8040201008040201u;
        // A byte that is not zero has one bit: adding 127 carries it into the highest.
        spread = ((spread + 0x7f7f7f7f7f7f7f7fu) & 0x8080808080808080u) >> 3;
        uint64_t values;
        std::memcpy(&values, q + 8 * byte, 8);
        values |= spread;
        std::memcpy(q + 8 * byte, &values, 8);
    }
}

template <Format kFormat>
void decode_legacy(const uint8_t* block, int output, DecodedGroup& out) {
    constexpr FormatTraits traits = traits_of(kFormat);
    uint8_t* q = out.q[output];
    store(out.scales, output, load_u16(block));
    const uint8_t* p = block + 2;
    if constexpr (traits.has_min) {
        // The file has scale * q + min; here the minimum is subtracted.
        store(out.scales + traits.scale_bytes(), output, static_cast<uint16_t>(load_u16(p) ^ 0x8000));
        p += 2;
    }
    if constexpr (traits.bits == 8) {
        for (int k = 0; k < kGroup; ++k) q[k] = p[k] ^ 128;  // + 128
        return;
    }
    uint32_t high = 0;
    if constexpr (traits.bits == 5) {
        std::memcpy(&high, p, 4);
        p += 4;
    }
    for (int k = 0; k < 16; ++k) {
        q[k] = p[k] & 15;
        q[k + 16] = p[k] >> 4;
    }
    if constexpr (traits.bits == 5) add_fifth_bits(q, high);
}

template <Format kFormat>
void decode_k45(const uint8_t* block, int group, int output, DecodedGroup& out) {
    constexpr FormatTraits traits = traits_of(kFormat);
    uint8_t* q = out.q[output];
    int scale, min;
    k_scale_min(block + 4, group, scale, min);
    store(out.scales, output, static_cast<int8_t>(scale));
    store(out.scales + traits.scale_bytes(), output, static_cast<int8_t>(min));
    store(out.units, output, load_u16(block));
    store(out.units, kPanel + output, load_u16(block + 2));
    const uint8_t* high = block + 16;
    const uint8_t* low = (kFormat == Format::Q5_K ? block + 48 : block + 16) + 32 * (group / 2);
    const int shift = 4 * (group % 2);
    for (int k = 0; k < kGroup; ++k) q[k] = (low[k] >> shift) & 15;
    if constexpr (kFormat == Format::Q5_K) {
        for (int k = 0; k < kGroup; ++k) q[k] |= ((high[k] >> group) & 1) << 4;
    }
}

void decode_k6(const uint8_t* block, int group, int output, DecodedGroup& out) {
    uint8_t* q = out.q[output];
    for (int sub = 0; sub < 2; ++sub) out.scales[sub * kPanel + output] = block[192 + 2 * group + sub];
    store(out.units, output, load_u16(block + 208));
    const int half = group / 4, quarter = group % 4;  // 128 values a half, 32 a quarter
    const uint8_t* low = block + 64 * half + 32 * (quarter % 2);
    const uint8_t* high = block + 128 + 32 * half;
    const int low_shift = 4 * (quarter / 2), high_shift = 2 * quarter;
    for (int k = 0; k < kGroup; ++k) {
        q[k] = ((low[k] >> low_shift) & 15) | (((high[k] >> high_shift) & 3) << 4);
    }
}

// Blocks of compressed safetensors as weights/ writes them: float32 scale (INT4: and minimum; INT4_CHANNEL: and step and
// base of 8 bits), then codes. All scales of an output by channel are the same.
template <Format kFormat>
void decode_integers(const uint8_t* block, int output, DecodedGroup& out) {
    uint8_t* q = out.q[output];
    std::memcpy(out.scales + 4 * output, block, 4);
    if constexpr (traits_of(kFormat).bits == 8) {
        for (int k = 0; k < kGroup; ++k) q[k] = block[4 + k] ^ 128;  // + 128
        return;
    }
    const uint8_t* codes = block + traits_of(kFormat).file_block_bytes - kGroup / 2;
    if constexpr (kFormat == Format::INT4_CHANNEL) {
        out.steps[output] = block[4];
        out.steps[kPanel + output] = block[5];
    } else {
        std::memcpy(out.scales + traits_of(kFormat).scale_bytes() + 4 * output, block + 4, 4);
    }
    for (int k = 0; k < 16; ++k) {
        q[k] = codes[k] & 15;
        q[k + 16] = codes[k] >> 4;
    }
}

template <Format kFormat>
void decode_group(const uint8_t* row, int group, int output, DecodedGroup& out) {
    constexpr FormatTraits traits = traits_of(kFormat);
    constexpr int kGroupsPerBlock = traits.file_block_values / kGroup;
    const uint8_t* block = row + static_cast<size_t>(group / kGroupsPerBlock) * traits.file_block_bytes;
    if constexpr (kFormat == Format::INT4 || kFormat == Format::INT8 || traits.by_channel) {
        decode_integers<kFormat>(block, output, out);
    } else if constexpr (kGroupsPerBlock == 1) {
        decode_legacy<kFormat>(block, output, out);
    } else if constexpr (kFormat == Format::Q6_K) {
        decode_k6(block, group % kGroupsPerBlock, output, out);
    } else {
        decode_k45<kFormat>(block, group % kGroupsPerBlock, output, out);
    }
}

// Low and high bits of a packed group from its codes.
template <Format kFormat>
void place_codes(const uint8_t (&q)[kPanel][kGroup], uint8_t* target) {
    constexpr FormatTraits traits = traits_of(kFormat);
    // Four consecutive inputs of an output are one word.
    alignas(64) uint32_t words[8][2][16];  // k4, half, output
    for (int output = 0; output < kPanel; ++output) {
        for (int k4 = 0; k4 < 8; ++k4) std::memcpy(&words[k4][output / 16][output % 16], &q[output][4 * k4], 4);
    }
    if constexpr (traits.bits == 8) {
        std::memcpy(target, words, sizeof(words));
        return;
    }
    for (int pair = 0; pair < 4; ++pair) {
        const uint32_t* first = words[2 * pair][0];
        const uint32_t* second = words[2 * pair + 1][0];
        uint32_t low[32];
        for (int i = 0; i < 32; ++i) low[i] = (first[i] & 0x0f0f0f0fu) | ((second[i] & 0x0f0f0f0fu) << 4);
        std::memcpy(target + pair * 128, low, sizeof(low));
    }
    if constexpr (traits.bits > 4) {
        constexpr uint32_t kHigh = 0x01010101u * ((1 << traits.num_high_bits()) - 1);
        std::memset(target + traits.low_bytes(), 0, traits.high_bytes());
        for (int k4 = 0; k4 < 8; ++k4) {
            uint32_t high[32];
            std::memcpy(high, target + traits.high_offset(k4, 0), sizeof(high));
            for (int i = 0; i < 32; ++i) high[i] |= (words[k4][i / 16][i % 16] >> 4 & kHigh) << traits.high_position(k4);
            std::memcpy(target + traits.high_offset(k4, 0), high, sizeof(high));
        }
    }
}

// `source`: the first of the panel's `num_rows` rows.
template <Format kFormat>
void repack_panel(const uint8_t* source, size_t row_bytes, int num_rows, int num_groups, uint8_t* target) {
    constexpr FormatTraits traits = traits_of(kFormat);
    DecodedGroup decoded{};
    const int num_padded = (num_groups + kChunk / kGroup - 1) / (kChunk / kGroup) * (kChunk / kGroup);
    uint8_t* channel_scales = target + static_cast<size_t>(num_padded) * traits.group_bytes();
    for (int group = 0; group < num_groups; ++group, target += traits.group_bytes()) {
        if (group % kBlockGroups == 0) {
            decoded.units = target;
            std::memset(target, 0, traits.unit_bytes());
            target += traits.unit_bytes();
        }
        decoded.scales = traits.by_channel ? channel_scales : target + traits.low_bytes() + traits.high_bytes();
        decoded.steps = target + traits.low_bytes();
        if (num_rows < kPanel) {
            std::memset(decoded.scales, 0, traits.scale_bytes() * (traits.has_min ? 2 : 1));
            if constexpr (kFormat == Format::INT4_CHANNEL) std::memset(decoded.steps, 0, 2 * kPanel);
        }
        for (int output = 0; output < num_rows; ++output) {
            decode_group<kFormat>(source + output * row_bytes, group, output, decoded);
        }
        place_codes<kFormat>(decoded.q, target);
    }
    if constexpr (traits.by_channel) {
        for (; target < channel_scales; target += traits.group_bytes()) {
            // Steps of 0 and codes of 128, whatever the bits.
            if constexpr (traits.bits == 4) std::memset(target, 0, traits.low_bytes() + kPanel);
            constexpr int kZeros = traits.bits == 4 ? traits.low_bytes() + kPanel : 0;
            std::memset(target + kZeros, traits.zero_point, traits.group_bytes() - kZeros);
        }
    }
}

// Values as they are: [inputs][32 outputs], or with pairs of inputs together.
template <typename Value, bool kPairs>
void repack_dense_panel(const uint8_t* source, size_t row_bytes, int num_rows, int num_groups, uint8_t* target) {
    auto* values = reinterpret_cast<Value*>(target);
    const int num_inputs = static_cast<int>(row_bytes / sizeof(Value)), padded_inputs = num_groups * kGroup;
    for (int k = 0; k < padded_inputs; ++k) {
        for (int output = 0; output < kPanel; ++output) {
            Value value = 0;
            if (k < num_inputs && output < num_rows) {
                std::memcpy(&value, source + output * row_bytes + k * sizeof(Value), sizeof(Value));
            }
            values[kPairs ? k / 2 * 2 * kPanel + 2 * output + k % 2 : k * kPanel + output] = value;
        }
    }
}

using RepackPanel = void (*)(const uint8_t*, size_t, int, int, uint8_t*);

RepackPanel repack_panel_of(Format format) {
    switch (format) {
        case Format::Q4_0: return repack_panel<Format::Q4_0>;
        case Format::Q4_1: return repack_panel<Format::Q4_1>;
        case Format::Q5_0: return repack_panel<Format::Q5_0>;
        case Format::Q5_1: return repack_panel<Format::Q5_1>;
        case Format::Q8_0: return repack_panel<Format::Q8_0>;
        case Format::Q4_K: return repack_panel<Format::Q4_K>;
        case Format::Q5_K: return repack_panel<Format::Q5_K>;
        case Format::Q6_K: return repack_panel<Format::Q6_K>;
        case Format::INT4: return repack_panel<Format::INT4>;
        case Format::INT8: return repack_panel<Format::INT8>;
        case Format::INT8_CHANNEL: return repack_panel<Format::INT8_CHANNEL>;
        case Format::INT4_CHANNEL: return repack_panel<Format::INT4_CHANNEL>;
        case Format::BF16: return repack_dense_panel<uint16_t, true>;
        case Format::F16: return repack_dense_panel<uint16_t, false>;
        case Format::F32: return repack_dense_panel<uint32_t, false>;
    }
    return nullptr;
}

}  // namespace

PackedMatrix make_packed_matrix(Format format, int num_outputs, int num_inputs) {
    PackedMatrix matrix{format, num_outputs, num_inputs, nullptr};
    const size_t size = (matrix.num_bytes() + 63) / 64 * 64;
    auto* data = static_cast<uint8_t*>(std::aligned_alloc(64, size));
    if (data == nullptr) throw std::bad_alloc();
    matrix.data = {data, FreeAligned()};
    return matrix;
}

void repack_panel(PackedMatrix& matrix, int panel, const uint8_t* source) {
    const int num_rows = std::min(kPanel, matrix.num_outputs - panel * kPanel);
    repack_panel_of(matrix.format)(source, matrix.file_row_bytes(), num_rows, matrix.num_groups(),
                                   matrix.data.get() + panel * matrix.panel_bytes());
}

void repack(PackedMatrix& matrix, const uint8_t* source, ThreadPool& pool) {
    pool.run(matrix.num_panels(), [&](int panel, int) {
        repack_panel(matrix, panel, source + panel * kPanel * matrix.file_row_bytes());
    });
}

}  // namespace pelton
