// Weights of a linear layer, repacked without loss from the block formats that weights/ reads.
//
// 32 output features make a panel; a panel is a row of groups of 32 input features. A group holds, in
// this order (k4: four consecutive inputs; lane: an output and one of its four inputs, 4 * output + input):
//   low bits   bits < 8: 4 pairs x 2 halves x 64 lanes, k4 = 2 * pair in the low nibble, 2 * pair + 1 in
//              the high one; bits == 8: 8 k4 x 2 halves x 64 lanes. A half is 16 outputs.
//   high bits  (bits - 4) planes of [4 pairs][2 halves][2 k4] x 64 lanes, one bit each
//   scales     [subgroups][32], float16 or float32
//   minima     the same, where the format has them
// The value of a weight is scale * (q - zero_point) - minimum.
//
// Dense formats have no scales; a group holds 32 inputs of
//   F32, F16   [32 inputs][32 outputs]
//   BF16       [16 pairs of inputs][32 outputs][2 inputs], as products of bfloat16 pairs want it
// and the last group of a row is filled up with zeros.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace pelton {

constexpr int kPanel = 32;
constexpr int kGroup = 32;

enum class Format { Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, INT4, INT8, BF16, F16, F32 };
constexpr int kNumFormats = 13;

struct FormatTraits {
    int bits;       // 16 and 32: dense
    int subgroups;  // scales per group of 32
    bool f16_scales;
    bool has_min;
    int zero_point;
    int file_block_values;
    int file_block_bytes;

    constexpr bool is_dense() const { return bits >= 16; }
    constexpr int low_bytes() const { return bits >= 8 ? bits * 128 : 512; }
    constexpr int high_bytes() const { return bits >= 8 ? 0 : (bits - 4) * 128; }
    constexpr int scale_bytes() const { return subgroups * kPanel * (f16_scales ? 2 : 4); }
    constexpr int group_bytes() const {
        return low_bytes() + high_bytes() + scale_bytes() * (has_min ? 2 : 1);
    }
};

constexpr FormatTraits traits_of(Format format) {
    switch (format) {
        case Format::Q4_0: return {4, 1, true, false, 8, 32, 18};
        case Format::Q4_1: return {4, 1, true, true, 0, 32, 20};
        case Format::Q5_0: return {5, 1, true, false, 16, 32, 22};
        case Format::Q5_1: return {5, 1, true, true, 0, 32, 24};
        case Format::Q8_0: return {8, 1, true, false, 128, 32, 34};
        case Format::Q4_K: return {4, 1, false, true, 0, 256, 144};
        case Format::Q5_K: return {5, 1, false, true, 0, 256, 176};
        case Format::Q6_K: return {6, 2, false, false, 32, 256, 210};
        case Format::INT4: return {4, 1, false, true, 0, 32, 24};
        case Format::INT8: return {8, 1, false, false, 128, 32, 36};
        case Format::BF16: return {16, 0, false, false, 0, 1, 2};
        case Format::F16: return {16, 0, false, false, 0, 1, 2};
        case Format::F32: return {32, 0, false, false, 0, 1, 4};
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
    size_t panel_bytes() const { return static_cast<size_t>(num_groups()) * traits_of(format).group_bytes(); }
    size_t num_bytes() const { return num_panels() * panel_bytes(); }
    const uint8_t* panel(int index) const { return data.get() + index * panel_bytes(); }
};

// Rows of activations in 8 bits: value = scale * q, one scale per row and group.
struct QuantizedRows {
    int num_rows;
    int num_inputs;
    const int8_t* values;   // [num_rows, num_inputs]
    const float* scales;    // [num_rows, num_groups]
    const int32_t* sums;    // [num_rows, num_groups, 2]: of q over each half of a group
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

// With memory of its own, not yet written.
PackedMatrix make_packed_matrix(Format format, int num_outputs, int num_inputs);

}  // namespace pelton
