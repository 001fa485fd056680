#include <cstring>
#include <new>

#include "float16.h"
#include "packed_matrix.h"
#include "thread_pool.h"

namespace pelton {

namespace {

// One output's 32 weights of a group, decoded as far as is exact.
struct DecodedGroup {
    uint8_t q[kGroup];
    float scale[2];
    float min[2];
    uint16_t scale_bits;  // as the file has them, where the format's scales are float16
    uint16_t min_bits;
};

uint16_t load_u16(const uint8_t* p) {
    uint16_t value;
    std::memcpy(&value, p, 2);
    return value;
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

uint32_t load_u32(const uint8_t* p) {
    uint32_t value;
    std::memcpy(&value, p, 4);
    return value;
}

// Blocks of compressed safetensors as weights/ writes them: float32 scale (INT4: and minimum), then codes.
void decode_integers(Format format, const uint8_t* block, DecodedGroup& out) {
    out.scale[0] = bits_to_float(load_u32(block));
    if (format == Format::INT8) {
        for (int k = 0; k < kGroup; ++k) out.q[k] = static_cast<uint8_t>(static_cast<int8_t>(block[4 + k]) + 128);
        return;
    }
    out.min[0] = bits_to_float(load_u32(block + 4));
    for (int k = 0; k < 16; ++k) {
        out.q[k] = block[8 + k] & 15;
        out.q[k + 16] = block[8 + k] >> 4;
    }
}

void decode_legacy(Format format, const uint8_t* block, DecodedGroup& out) {
    out.scale_bits = load_u16(block);
    const bool has_min = format == Format::Q4_1 || format == Format::Q5_1;
    const uint8_t* p = block + 2;
    if (has_min) {
        // The file has scale * q + min; here the minimum is subtracted.
        out.min_bits = load_u16(p) ^ 0x8000;
        p += 2;
    }
    if (format == Format::Q8_0) {
        for (int k = 0; k < kGroup; ++k) out.q[k] = static_cast<uint8_t>(static_cast<int8_t>(p[k]) + 128);
        return;
    }
    uint32_t high = 0;
    if (format == Format::Q5_0 || format == Format::Q5_1) {
        std::memcpy(&high, p, 4);
        p += 4;
    }
    for (int k = 0; k < 16; ++k) {
        out.q[k] = (p[k] & 15) | (((high >> k) & 1) << 4);
        out.q[k + 16] = (p[k] >> 4) | (((high >> (k + 16)) & 1) << 4);
    }
}

void decode_k45(Format format, const uint8_t* block, int group, DecodedGroup& out) {
    const float d = half_to_float(load_u16(block)), dmin = half_to_float(load_u16(block + 2));
    int scale, min;
    k_scale_min(block + 4, group, scale, min);
    out.scale[0] = d * static_cast<float>(scale);
    out.min[0] = dmin * static_cast<float>(min);
    const uint8_t* high = block + 16;
    const uint8_t* low = format == Format::Q5_K ? block + 48 : block + 16;
    low += 32 * (group / 2);
    for (int k = 0; k < kGroup; ++k) {
        out.q[k] = (low[k] >> (4 * (group % 2))) & 15;
        if (format == Format::Q5_K) out.q[k] |= ((high[k] >> group) & 1) << 4;
    }
}

void decode_k6(const uint8_t* block, int group, DecodedGroup& out) {
    const float d = half_to_float(load_u16(block + 208));
    const auto* scales = reinterpret_cast<const int8_t*>(block + 192);
    out.scale[0] = d * static_cast<float>(scales[2 * group]);
    out.scale[1] = d * static_cast<float>(scales[2 * group + 1]);
    const int half = group / 4, quarter = group % 4;  // 128 values a half, 32 a quarter
    const uint8_t* low = block + 64 * half + 32 * (quarter % 2);
    const uint8_t* high = block + 128 + 32 * half;
    for (int k = 0; k < kGroup; ++k) {
        out.q[k] = ((low[k] >> (4 * (quarter / 2))) & 15) | (((high[k] >> (2 * quarter)) & 3) << 4);
    }
}

void decode_group(Format format, const uint8_t* row, int group, DecodedGroup& out) {
    const FormatTraits traits = traits_of(format);
    const int groups_per_block = traits.file_block_values / kGroup;
    const uint8_t* block = row + static_cast<size_t>(group / groups_per_block) * traits.file_block_bytes;
    if (format == Format::INT4 || format == Format::INT8) {
        decode_integers(format, block, out);
    } else if (groups_per_block == 1) {
        decode_legacy(format, block, out);
    } else if (format == Format::Q6_K) {
        decode_k6(block, group % groups_per_block, out);
    } else {
        decode_k45(format, block, group % groups_per_block, out);
    }
}

void place(const FormatTraits& traits, uint8_t* group, int output, const DecodedGroup& decoded) {
    const int half = output / 16, lane = 4 * (output % 16);
    for (int k = 0; k < kGroup; ++k) {
        const int k4 = k / 4, at = lane + k % 4, q = decoded.q[k];
        if (traits.bits == 8) {
            group[(2 * k4 + half) * 64 + at] = static_cast<uint8_t>(q);
            continue;
        }
        const int pair = k4 / 2, second = k4 % 2;
        group[(2 * pair + half) * 64 + at] |= static_cast<uint8_t>((q & 15) << (4 * second));
        for (int plane = 0; plane < traits.bits - 4; ++plane) {
            uint8_t* bits = group + traits.low_bytes() + plane * 128 + ((2 * pair + half) * 2 + second) * 8;
            bits[at / 8] |= static_cast<uint8_t>(((q >> (4 + plane)) & 1) << (at % 8));
        }
    }
    uint8_t* scales = group + traits.low_bytes() + traits.high_bytes();
    for (int sub = 0; sub < traits.subgroups; ++sub) {
        const int index = sub * kPanel + output;
        if (traits.f16_scales) {
            std::memcpy(scales + 2 * index, &decoded.scale_bits, 2);
            if (traits.has_min) std::memcpy(scales + traits.scale_bytes() + 2 * index, &decoded.min_bits, 2);
        } else {
            std::memcpy(scales + 4 * index, &decoded.scale[sub], 4);
            if (traits.has_min) std::memcpy(scales + traits.scale_bytes() + 4 * index, &decoded.min[sub], 4);
        }
    }
}

// One output's values of a dense format.
void place_dense(Format format, uint8_t* panel, int output, const uint8_t* row, int num_inputs) {
    const FormatTraits traits = traits_of(format);
    const size_t size = traits.file_block_bytes;
    for (int k = 0; k < num_inputs; ++k) {
        const size_t at = format == Format::BF16 ? static_cast<size_t>(k / 2) * 2 * kPanel + 2 * output + k % 2
                                                 : static_cast<size_t>(k) * kPanel + output;
        std::memcpy(panel + at * size, row + k * size, size);
    }
}

}  // namespace

PackedMatrix make_packed_matrix(Format format, int num_outputs, int num_inputs) {
    PackedMatrix matrix{format, num_outputs, num_inputs, nullptr};
    const size_t size = (matrix.num_bytes() + 63) / 64 * 64;
    auto* data = static_cast<uint8_t*>(std::aligned_alloc(64, size));
    if (data == nullptr) throw std::bad_alloc();
    std::memset(data, 0, size);
    matrix.data.reset(data);
    return matrix;
}

void repack(PackedMatrix& matrix, const uint8_t* source, int first_output, int num_outputs, ThreadPool& pool) {
    const FormatTraits traits = traits_of(matrix.format);
    const size_t row_bytes =
        static_cast<size_t>(matrix.num_inputs / traits.file_block_values) * traits.file_block_bytes;
    const int first_panel = first_output / kPanel;
    const int last_panel = (first_output + num_outputs - 1) / kPanel;
    pool.run(last_panel - first_panel + 1, [&](int index, int) {
        const int panel = first_panel + index;
        uint8_t* target = matrix.data.get() + panel * matrix.panel_bytes();
        for (int output = 0; output < kPanel; ++output) {
            const int row = panel * kPanel + output - first_output;
            if (row < 0 || row >= num_outputs) continue;
            if (traits.is_dense()) {
                place_dense(matrix.format, target, output, source + row * row_bytes, matrix.num_inputs);
                continue;
            }
            for (int group = 0; group < matrix.num_groups(); ++group) {
                DecodedGroup decoded{};
                decode_group(matrix.format, source + row * row_bytes, group, decoded);
                place(traits, target + static_cast<size_t>(group) * traits.group_bytes(), output, decoded);
            }
        }
    });
}

}  // namespace pelton
