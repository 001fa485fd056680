// Weights of a linear layer, repacked without loss from the block formats that weights/ reads.
//
// 32 output features make a panel; a panel is a row of groups of 32 input features. A group holds, in
// this order (k4: four consecutive inputs; lane: an output and one of its four inputs, 4 * output + input):
//   low bits   bits < 8: 4 pairs x 2 halves x 64 lanes, k4 = 2 * pair in the low nibble, 2 * pair + 1 in
//              the high one; bits == 8: 8 k4 x 2 halves x 64 lanes. A half is 16 outputs.
//   high bits  4 < bits < 8: (bits - 4) planes of [2 halves] x 64 lanes, a byte for 8 / (bits - 4) k4, the first lowest
//   scales     [subgroups][32], float16, float32 or 8 bits
//   minima     the same, where the format has them
// The value of a weight is scale * (q - zero_point) - minimum. Scales of 8 bits are multiples of a unit: ahead of every
// eight groups lie those of their scales, [32] float16, and likewise of their minima (the blocks of GGUF's K formats).
//
// Dense formats have no scales; a group holds 32 inputs of
//   F32, F16   [32 inputs][32 outputs]
//   BF16       [16 pairs of inputs][32 outputs][2 inputs], as products of bfloat16 pairs want it
// and the last group of a row is filled up with zeros.
//
// Formats by channel have one scale per output: value = scale * (code - 128), codes of 8 bits. Their groups come in
// an even number (the last may be of zeros), and the scales [32] float32 of a panel follow them.
//   INT8_CHANNEL  groups hold codes
//   INT4_CHANNEL  low bits q, then steps [32] and bases [32] of 8 bits: code = base + step * q, which fits in 8 bits
//                 (QServe's progressive groups, Lin et al., arXiv:2405.04532)
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace pelton {

constexpr int kPanel = 32;
constexpr int kGroup = 32;
constexpr int kBlockGroups = 8;  // that have the units of their scales in common
constexpr int kChunk = 64;  // inputs of formats by channel that are multiplied at once

enum class Format { Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, INT4, INT8, INT8_CHANNEL, INT4_CHANNEL, BF16, F16, F32 };
constexpr int kNumFormats = 15;

enum class ScaleType { I8, F16, F32 };  // I8: multiples of a unit

struct FormatTraits {
    int bits;       // 16 and 32: dense
    int subgroups;  // scales per group of 32
    ScaleType scale_type;
    bool has_min;
    int zero_point;
    int file_block_values;
    int file_block_bytes;
    bool by_channel = false;

    constexpr bool is_dense() const { return bits >= 16; }
    constexpr int low_bytes() const { return bits >= 8 ? bits * 128 : 512; }
    constexpr int high_bytes() const { return bits >= 8 ? 0 : num_high_bits() * 128; }
    constexpr int num_high_bits() const { return bits - 4; }
    constexpr int k4_per_plane() const { return 8 / num_high_bits(); }
    // From a group's first byte: where the high bits of k4 lie, and above which bit of a byte.
    constexpr int high_offset(int k4, int half) const { return low_bytes() + (k4 / k4_per_plane() * 2 + half) * 64; }
    constexpr int high_position(int k4) const { return k4 % k4_per_plane() * num_high_bits(); }
    constexpr bool has_units() const { return scale_type == ScaleType::I8; }
    constexpr int scale_bytes() const {
        return subgroups * kPanel * (scale_type == ScaleType::F32 ? 4 : scale_type == ScaleType::F16 ? 2 : 1);
    }
    // Of a block's scales, and of its minima.
    constexpr int unit_bytes() const { return has_units() ? 2 * kPanel * (has_min ? 2 : 1) : 0; }
    constexpr int group_bytes() const {
        if (by_channel) return low_bytes() + (bits == 4 ? 2 * kPanel : 0);
        return low_bytes() + high_bytes() + scale_bytes() * (has_min ? 2 : 1);
    }
    // From a panel's first byte.
    constexpr size_t block_offset(int block) const {
        return static_cast<size_t>(block) * (kBlockGroups * group_bytes() + unit_bytes());
    }
    constexpr size_t group_offset(int group) const {
        return block_offset(group / kBlockGroups) + unit_bytes() + static_cast<size_t>(group % kBlockGroups) * group_bytes();
    }
};

constexpr FormatTraits traits_of(Format format) {
    switch (format) {
        case Format::Q4_0: return {4, 1, ScaleType::F16, false, 8, 32, 18};
        case Format::Q4_1: return {4, 1, ScaleType::F16, true, 0, 32, 20};
        case Format::Q5_0: return {5, 1, ScaleType::F16, false, 16, 32, 22};
        case Format::Q5_1: return {5, 1, ScaleType::F16, true, 0, 32, 24};
        case Format::Q8_0: return {8, 1, ScaleType::F16, false, 128, 32, 34};
        case Format::Q4_K: return {4, 1, ScaleType::I8, true, 0, 256, 144};
        case Format::Q5_K: return {5, 1, ScaleType::I8, true, 0, 256, 176};
        case Format::Q6_K: return {6, 2, ScaleType::I8, false, 32, 256, 210};
        case Format::INT4: return {4, 1, ScaleType::F32, true, 0, 32, 24};
        case Format::INT8: return {8, 1, ScaleType::F32, false, 128, 32, 36};
        case Format::INT8_CHANNEL: return {8, 1, ScaleType::F32, false, 128, 32, 36, true};
        case Format::INT4_CHANNEL: return {4, 1, ScaleType::F32, false, 128, 32, 22, true};
        case Format::BF16: return {16, 0, ScaleType::F32, false, 0, 1, 2};
        case Format::F16: return {16, 0, ScaleType::F32, false, 0, 1, 2};
        case Format::F32: return {32, 0, ScaleType::F32, false, 0, 1, 4};
    }
    return {};
}

struct FreeAligned {
    void operator()(uint8_t* data) const { std::free(data); }
};

struct PackedMatrix {
    Format format;
    int num_outputs;  // as in the file; panels are padded with zeros
    int num_inputs;
    std::shared_ptr<uint8_t> data;  // its own, or part of a `WeightMemory`, which may be read-only

    int num_groups() const { return (num_inputs + kGroup - 1) / kGroup; }
    int num_panels() const { return (num_outputs + kPanel - 1) / kPanel; }
    size_t panel_bytes() const {
        const FormatTraits traits = traits_of(format);
        if (traits.by_channel) return codes_bytes() + kPanel * sizeof(float);
        return traits.group_offset(num_groups()) - traits.unit_bytes();
    }
    // Formats by channel only.
    int num_chunks() const { return (num_inputs + kChunk - 1) / kChunk; }
    size_t codes_bytes() const { return static_cast<size_t>(num_chunks()) * (kChunk / kGroup) * traits_of(format).group_bytes(); }
    const float* channel_scales(int index) const {
        return reinterpret_cast<const float*>(panel(index) + codes_bytes());
    }
    size_t num_bytes() const { return num_panels() * panel_bytes(); }
    size_t file_row_bytes() const {
        const FormatTraits traits = traits_of(format);
        return static_cast<size_t>(num_inputs / traits.file_block_values) * traits.file_block_bytes;
    }
    const uint8_t* panel(int index) const { return data.get() + index * panel_bytes(); }
};

// Rows of activations in 8 bits: value = scale * q, one scale per row and group.
struct QuantizedRows {
    int num_rows;
    int num_inputs;
    int8_t* values;   // [num_rows, num_inputs]
    float* scales;    // [num_rows, num_groups]
    int32_t* sums;    // [num_rows, num_groups, 2]: of q over each half of a group
};

// A value beyond so many root mean squares of its row is an outlier: fewer than one in 100 are, and once more so many
// where these are left out.
constexpr int kOutlierRatio = 10;

constexpr int most_outliers(int num_inputs) { return 2 * (num_inputs / (kOutlierRatio * kOutlierRatio) + 1); }

// A code of more than 8 bits: what lies in the row, and kHighStep times codes[input % 4]; the other three are 0.
struct Outlier {
    static constexpr int kHighStep = 255;  // what is left is -127 to 127
    int32_t input;
    int8_t codes[4];
};

// Rows of activations in 8 bits with one scale each: tiles [ceil(num_rows / 16)][num_inputs / 64][16][64], filled up
// with zeros at the end of a row. Few values that are far larger than a row's others would leave those too little of the
// 8 bits; they have longer codes, of the same scale, so that sums of products are still integers.
struct ByteRows {
    static constexpr int kHeight = 16;
    static constexpr int kTileBytes = kHeight * kChunk;
    int num_rows;
    int num_inputs;
    int8_t* values;
    float* scales;          // [num_rows]
    int32_t* sums;          // [num_rows]: of a row's codes
    int32_t* num_outliers;  // [num_rows]
    Outlier* outliers;      // [num_rows][most_outliers(num_inputs)]; null: no codes are longer, whatever the values
    int first = 0;          // index of the first row, where this is a part

    int num_chunks() const { return (num_inputs + kChunk - 1) / kChunk; }
    bool is_few() const { return num_rows <= 2 * kHeight; }
    int64_t block_bytes() const { return static_cast<int64_t>(num_chunks()) * kTileBytes; }
    // The first chunk of a row; the next is kTileBytes further on.
    int8_t* row(int index) const { return values + index / kHeight * block_bytes() + index % kHeight * kChunk; }

    // `count` rows or those that are left from `first` on, a multiple of 16.
    ByteRows from(int first, int count) const {
        return {count < num_rows - first ? count : num_rows - first, num_inputs, row(first), scales + first, sums + first,
                num_outliers + first, outliers == nullptr ? nullptr : outliers_of(first), this->first + first};
    }
    Outlier* outliers_of(int row) const { return outliers + static_cast<int64_t>(row) * most_outliers(num_inputs); }
};

struct FloatRows {
    int num_rows;
    int num_inputs;
    const float* values;  // [num_rows, num_inputs]
};

class ThreadPool;

// `source`: rows of file blocks, [num_outputs, num_inputs / file_block_values]. Writes every byte of `matrix`.
// What it writes is kept on disk: whoever changes that raises LAYOUT_VERSION in cpu/weight_cache.py.
void repack(PackedMatrix& matrix, const uint8_t* source, ThreadPool& pool);

// One panel of it; `source`: the panel's rows.
void repack_panel(PackedMatrix& matrix, int panel, const uint8_t* source);

// With memory of its own, not yet written.
PackedMatrix make_packed_matrix(Format format, int num_outputs, int num_inputs);

}  // namespace pelton
