#include "block_rows.h"

#include <cstring>
#include <stdexcept>

#include "float16.h"

namespace pelton {

namespace {

uint16_t load_u16(const uint8_t* p) {
    uint16_t value;
    std::memcpy(&value, p, 2);
    return value;
}

uint32_t load_u32(const uint8_t* p) {
    uint32_t value;
    std::memcpy(&value, p, 4);
    return value;
}

float load_half(const uint8_t* p) { return half_to_float(load_u16(p)); }

// The 16 levels of IQ4_NL and IQ4_XS.
constexpr float kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

void decode_f32(const uint8_t* block, float* out) { std::memcpy(out, block, 4); }
void decode_f16(const uint8_t* block, float* out) { *out = load_half(block); }
void decode_bf16(const uint8_t* block, float* out) { *out = bfloat16_to_float(load_u16(block)); }

// Codes of 32 values: 4 bits from `low`, the fifth from `high`.
template <typename Value>
void each_code(const uint8_t* low, uint32_t high, const Value& value) {
    for (int k = 0; k < 16; ++k) {
        value(k, (low[k] & 15) | (((high >> k) & 1) << 4));
        value(k + 16, (low[k] >> 4) | (((high >> (k + 16)) & 1) << 4));
    }
}

void decode_q4_0(const uint8_t* block, float* out) {
    const float d = load_half(block);
    each_code(block + 2, 0, [&](int k, int q) { out[k] = static_cast<float>(q - 8) * d; });
}

void decode_q4_1(const uint8_t* block, float* out) {
    const float d = load_half(block), m = load_half(block + 2);
    each_code(block + 4, 0, [&](int k, int q) { out[k] = static_cast<float>(q) * d + m; });
}

void decode_q5_0(const uint8_t* block, float* out) {
    const float d = load_half(block);
    each_code(block + 6, load_u32(block + 2), [&](int k, int q) { out[k] = static_cast<float>(q - 16) * d; });
}

void decode_q5_1(const uint8_t* block, float* out) {
    const float d = load_half(block), m = load_half(block + 2);
    each_code(block + 8, load_u32(block + 4), [&](int k, int q) { out[k] = static_cast<float>(q) * d + m; });
}

void decode_q8_0(const uint8_t* block, float* out) {
    const float d = load_half(block);
    for (int k = 0; k < 32; ++k) out[k] = static_cast<float>(static_cast<int8_t>(block[2 + k])) * d;
}

void decode_iq4_nl(const uint8_t* block, float* out) {
    const float d = load_half(block);
    each_code(block + 2, 0, [&](int k, int q) { out[k] = kLevels[q] * d; });
}

// K blocks: 256 values, in sub-blocks with scales of their own.

void decode_q2_k(const uint8_t* block, float* out) {
    const uint8_t *scales = block, *codes = block + 16;
    const float d = load_half(block + 80), dmin = load_half(block + 82);
    for (int k = 0; k < 256; ++k) {
        const int sub = k / 16, half = k / 128, shift = 2 * (k % 128 / 32);
        const int q = (codes[32 * half + k % 32] >> shift) & 3;
        out[k] = static_cast<float>(q) * (d * static_cast<float>(scales[sub] & 15));
        out[k] -= dmin * static_cast<float>(scales[sub] >> 4);
    }
}

void decode_q3_k(const uint8_t* block, float* out) {
    const uint8_t *high = block, *codes = block + 32, *packed = block + 96;
    const float d = load_half(block + 108);
    float scales[16];
    for (int sub = 0; sub < 16; ++sub) {
        const int low = sub < 8 ? packed[sub] & 15 : packed[sub - 8] >> 4;
        const int upper = (packed[8 + sub % 4] >> (2 * (sub / 4))) & 3;
        scales[sub] = d * static_cast<float>((low | (upper << 4)) - 32);
    }
    for (int k = 0; k < 256; ++k) {
        const int half = k / 128, shift = 2 * (k % 128 / 32);
        const int q = ((codes[32 * half + k % 32] >> shift) & 3) - ((high[k % 32] >> (k / 32)) & 1 ? 0 : 4);
        out[k] = static_cast<float>(q) * scales[k / 16];
    }
}

// Six-bit scale and minimum of each sub-block of 32, as Q4_K and Q5_K have them.
void load_scales_and_mins(const uint8_t* block, float (&scales)[8], float (&mins)[8]) {
    const float d = load_half(block), dmin = load_half(block + 2);
    const uint8_t* p = block + 4;
    for (int sub = 0; sub < 8; ++sub) {
        const int low = sub % 4;
        const int scale = sub < 4 ? p[low] & 63 : (p[8 + low] & 15) | ((p[low] >> 2) & 48);
        const int min = sub < 4 ? p[4 + low] & 63 : (p[8 + low] >> 4) | ((p[4 + low] >> 2) & 48);
        scales[sub] = d * static_cast<float>(scale);
        mins[sub] = dmin * static_cast<float>(min);
    }
}

template <bool has_fifth_bit>
void decode_q45_k(const uint8_t* block, float* out) {
    const uint8_t *high = block + 16, *codes = block + (has_fifth_bit ? 48 : 16);
    float scales[8], mins[8];
    load_scales_and_mins(block, scales, mins);
    for (int k = 0; k < 256; ++k) {
        const int sub = k / 32;
        int q = (codes[32 * (sub / 2) + k % 32] >> (4 * (sub % 2))) & 15;
        if (has_fifth_bit) q |= ((high[k % 32] >> sub) & 1) << 4;
        out[k] = static_cast<float>(q) * scales[sub];
        out[k] -= mins[sub];
    }
}

void decode_q6_k(const uint8_t* block, float* out) {
    const uint8_t *low = block, *high = block + 128;
    const auto* scales = reinterpret_cast<const int8_t*>(block + 192);
    const float d = load_half(block + 208);
    for (int k = 0; k < 256; ++k) {
        const int half = k / 128, quarter = k % 128 / 32;
        const int nibble = (low[64 * half + 32 * (quarter % 2) + k % 32] >> (4 * (quarter / 2))) & 15;
        const int q = nibble | (((high[32 * half + k % 32] >> (2 * quarter)) & 3) << 4);
        out[k] = static_cast<float>(q - 32) * (d * static_cast<float>(scales[k / 16]));
    }
}

void decode_iq4_xs(const uint8_t* block, float* out) {
    const float d = load_half(block);
    const uint16_t upper = load_u16(block + 2);
    for (int sub = 0; sub < 8; ++sub) {
        const int low = (block[4 + sub / 2] >> (4 * (sub % 2))) & 15;
        const float scale = d * static_cast<float>((low | (((upper >> (2 * sub)) & 3) << 4)) - 32);
        each_code(block + 8 + 16 * sub, 0, [&](int k, int q) { out[32 * sub + k] = kLevels[q] * scale; });
    }
}

struct BlockFormat {
    const char* name;
    int values;
    int bytes;
    void (*decode)(const uint8_t* blocks, int num_blocks, float* out);
};

// A loop that the compiler sees through.
template <int values, int bytes, void (*decode)(const uint8_t*, float*)>
constexpr BlockFormat blocks_of(const char* name) {
    return {name, values, bytes, [](const uint8_t* blocks, int num_blocks, float* out) {
                for (int i = 0; i < num_blocks; ++i) decode(blocks + static_cast<int64_t>(i) * bytes, out + i * values);
            }};
}

constexpr BlockFormat kBlockFormats[] = {
    blocks_of<1, 4, decode_f32>("F32"),
    blocks_of<1, 2, decode_f16>("F16"),
    blocks_of<1, 2, decode_bf16>("BF16"),
    blocks_of<32, 18, decode_q4_0>("Q4_0"),
    blocks_of<32, 20, decode_q4_1>("Q4_1"),
    blocks_of<32, 22, decode_q5_0>("Q5_0"),
    blocks_of<32, 24, decode_q5_1>("Q5_1"),
    blocks_of<32, 34, decode_q8_0>("Q8_0"),
    blocks_of<256, 84, decode_q2_k>("Q2_K"),
    blocks_of<256, 110, decode_q3_k>("Q3_K"),
    blocks_of<256, 144, decode_q45_k<false>>("Q4_K"),
    blocks_of<256, 176, decode_q45_k<true>>("Q5_K"),
    blocks_of<256, 210, decode_q6_k>("Q6_K"),
    blocks_of<32, 18, decode_iq4_nl>("IQ4_NL"),
    blocks_of<256, 136, decode_iq4_xs>("IQ4_XS"),
};

const BlockFormat& find_format(const std::string& name) {
    for (const auto& format : kBlockFormats) {
        if (name == format.name) return format;
    }
    throw std::invalid_argument("blocks of format " + name + " are unknown");
}

}  // namespace

std::vector<std::string> block_row_formats() {
    std::vector<std::string> names;
    for (const auto& format : kBlockFormats) names.emplace_back(format.name);
    return names;
}

BlockRows::BlockRows(const std::string& format_name, const uint8_t* bytes, size_t num_bytes, int64_t rows, int columns)
    : num_rows(rows), width(columns), data_(bytes) {
    const BlockFormat& format = find_format(format_name);
    decode_ = format.decode;
    if (rows < 0 || columns <= 0 || columns % format.values != 0) {
        throw std::invalid_argument("rows are not whole blocks of " + format_name);
    }
    num_blocks_ = columns / format.values;
    row_bytes_ = static_cast<int64_t>(num_blocks_) * format.bytes;
    if (num_bytes != static_cast<size_t>(rows) * row_bytes_) {
        throw std::invalid_argument("rows of " + format_name + " have the wrong number of bytes");
    }
}

}  // namespace pelton
