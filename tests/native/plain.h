// The kernels' results once more, one number at a time in double, from the packed layout as packed_matrix.h
// describes it. Only these say, on a processor that is emulated, that the numbers are right.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "attention.h"
#include "quantized_group.h"
#include "runtime.h"

namespace pelton::plain {

struct Weight {
    double value;
    double size;  // of the terms that the value is made of
};

inline float load_float(const uint8_t* p, int index, ScaleType type) {
    if (type == ScaleType::I8) return static_cast<int8_t>(p[index]);
    if (type == ScaleType::F16) {
        uint16_t half;
        std::memcpy(&half, p + 2 * index, 2);
        return half_to_float(half);
    }
    float value;
    std::memcpy(&value, p + 4 * index, 4);
    return value;
}

inline Weight weight_of(const PackedMatrix& matrix, int output, int input) {
    const FormatTraits traits = traits_of(matrix.format);
    const int lane = output % kPanel, k = input % kGroup, half = lane / 16;
    const bool has_units = traits.scale_type == ScaleType::I8;
    const int unit_bytes = has_units ? (traits.has_min ? 128 : 64) : 0, num_units = input / (8 * kGroup) + 1;
    const uint8_t* group =
        matrix.panel(output / kPanel) + static_cast<size_t>(input / kGroup) * traits.group_bytes() + num_units * unit_bytes;
    const uint8_t* units = group - input / kGroup % 8 * traits.group_bytes() - unit_bytes;
    if (matrix.format == Format::BF16) {
        uint16_t bits;
        std::memcpy(&bits, group + 2 * ((k / 2) * 2 * kPanel + 2 * lane + k % 2), 2);
        return {bfloat16_to_float(bits), std::abs(bfloat16_to_float(bits))};
    }
    if (traits.is_dense()) {
        const float value = load_float(group, k * kPanel + lane, matrix.format == Format::F16 ? ScaleType::F16 : ScaleType::F32);
        return {value, std::abs(value)};
    }
    const int at = 4 * (lane % 16) + k % 4, k4 = k / 4, place = 2 * (k4 / 2) + half;
    int code;
    if (traits.bits == 8) {
        code = group[(2 * k4 + half) * 64 + at];
    } else {
        code = (group[place * 64 + at] >> (4 * (k4 % 2))) & 15;
        const int num_high = traits.bits - 4, per_byte = num_high == 0 ? 1 : 8 / num_high;
        if (num_high > 0) {
            const int byte = group[traits.low_bytes() + (k4 / per_byte * 2 + half) * 64 + at];
            code |= (byte >> (k4 % per_byte * num_high) & ((1 << num_high) - 1)) << 4;
        }
    }
    if (traits.by_channel) {
        if (traits.bits == 4) code = group[traits.low_bytes() + kPanel + lane] + group[traits.low_bytes() + lane] * code;
        const double value = (code - traits.zero_point) * double{matrix.channel_scales(output / kPanel)[lane]};
        return {value, std::abs(value)};
    }
    const uint8_t* scales = group + traits.low_bytes() + traits.high_bytes();
    const int sub = k * traits.subgroups / kGroup;
    const auto factor = [&](const uint8_t* from, int index, int first_unit) {
        return double{load_float(from, index, traits.scale_type)} *
               (has_units ? load_float(units, first_unit + lane, ScaleType::F16) : 1.0f);
    };
    const double product = (code - traits.zero_point) * factor(scales, sub * kPanel + lane, 0);
    if (!traits.has_min) return {product, std::abs(product)};
    const double minimum = factor(scales + traits.scale_bytes(), lane, kPanel);
    return {product - minimum, std::abs(product) + std::abs(minimum)};
}

// What a row of activations is taken for: as it is (group size 0), or rounded to 8 bits per group; where one group
// is the row (`has_outliers`), to more where it has outliers.
inline std::vector<double> activations(const float* x, int num_inputs, int group_size, bool has_outliers) {
    std::vector<double> values(x, x + num_inputs);
    for (int first = 0; group_size > 0 && first < num_inputs; first += group_size) {
        uint32_t largest = 0;
        for (int i = first; i < first + group_size; ++i) largest = std::max(largest, float_to_bits(std::abs(x[i])));
        const auto squares_below = [&](float limit) {
            double sum = 0.0;
            for (int i = first; i < first + group_size; ++i) sum += std::abs(x[i]) <= limit ? double{x[i]} * x[i] : 0.0;
            return static_cast<float>(sum);
        };
        const GroupScale scale =
            has_outliers ? scale_of_row(largest, squares_below(bits_to_float(largest)), group_size, squares_below)
                         : scale_of_group(largest);
        for (int i = first; i < first + group_size; ++i) {
            const float code = scale.inverse == 0.0f ? 0.0f : std::nearbyint(x[i] * scale.inverse);
            values[i] = double{code} * scale.scale;
        }
    }
    return values;
}

// `size`: of the terms summed up. What may overflow on the way is not compared.
inline bool near(double actual, double expected, double size) {
    if (!std::isfinite(expected) || !(size < 1e30)) return true;
    return std::abs(actual - expected) <= 1e-5 * size + 1e-30;
}

// Whether out [rows, outputs of the weight] is right.
inline bool is_product(const LinearWeight& weight, const float* x, int num_rows, const float* bias, bool in_floats,
                       const float* out) {
    for (int row = 0; row < num_rows; ++row) {
        const float* values = x + static_cast<size_t>(row) * weight.num_inputs;
        int column = 0;
        for (const PackedMatrix& part : weight.parts) {
            const FormatTraits traits = traits_of(part.format);
            const int group_size = traits.by_channel ? weight.num_inputs : in_floats || traits.is_dense() ? 0 : kGroup;
            const auto rounded = activations(values, weight.num_inputs, group_size, traits.by_channel);
            for (int output = 0; output < part.num_outputs; ++output, ++column) {
                double sum = bias != nullptr ? bias[column] : 0.0, size = std::abs(sum);
                for (int k = 0; k < weight.num_inputs; ++k) {
                    const Weight w = weight_of(part, output, k);
                    sum += w.value * rounded[k];
                    size += w.size * std::abs(rounded[k]);
                }
                if (!near(out[static_cast<size_t>(row) * weight.num_outputs + column], sum, size)) return false;
            }
        }
    }
    return true;
}

// Whether the attention of one request's tokens is right; caches as attention.h has them.
inline bool is_attention(const AttentionShape& shape, const AttentionRequest& request, const void* keys,
                         const void* values) {
    const int dim = shape.head_dim;
    const auto cached = [&](const void* cache, int position, int head, int d) {
        const int64_t block = request.block_table[position / shape.block_size];
        const int64_t slot = block * shape.block_size + position % shape.block_size;
        const int64_t at = (slot * shape.num_kv_heads + head) * dim + d;
        return double{shape.kv_type == KVType::F32 ? static_cast<const float*>(cache)[at]
                                                   : bfloat16_to_float(static_cast<const uint16_t*>(cache)[at])};
    };
    for (int token = 0; token < request.num_tokens; ++token) {
        const int position = request.seq_len - request.num_tokens + token;
        const int first = shape.sliding_window > 0 ? std::max(0, position - shape.sliding_window + 1) : 0;
        for (int head = 0; head < shape.num_heads; ++head) {
            const int kv_head = head / (shape.num_heads / shape.num_kv_heads);
            std::vector<double> expected(dim);
            double sum = 0.0;
            for (int p = first; p <= position; ++p) {
                double score = 0.0;
                const float* query = request.query + token * request.ld_query + head * dim;
                for (int d = 0; d < dim; ++d) score += double{query[d]} * cached(keys, p, kv_head, d);
                score *= shape.scale;
                if (shape.softcap > 0.0f) score = shape.softcap * std::tanh(score / shape.softcap);
                const double weight = std::exp(score);
                sum += weight;
                for (int d = 0; d < dim; ++d) expected[d] += weight * cached(values, p, kv_head, d);
            }
            for (int d = 0; d < dim; ++d) {
                // AVX-512 may round queries and probabilities to bfloat16.
                const double actual = request.out[(static_cast<int64_t>(token) * shape.num_heads + head) * dim + d];
                if (std::abs(actual - expected[d] / sum) > 0.02) return false;
            }
        }
    }
    return true;
}

}  // namespace pelton::plain
